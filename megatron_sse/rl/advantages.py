"""Advantages of answers over their group, and the weight of each token in the loss, by algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sse.config import RLConfig
from megatron_sse.rl.prompts import Prompt
from megatron_sse.rl.rollouts import Rollout

# Rewards that differ by less are equal: sums of weighted rewards are rounded.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Group:
    """The answers to a prompt and their rewards."""

    prompt: Prompt
    rollouts: list[Rollout]
    rewards: list[float]


@dataclass(frozen=True)
class Answer:
    """A rollout as training sees it.

    advantage: of every token. weight: of every token in the sum that is the loss of the step.
    """

    prompt: list[int]
    rollout: Rollout
    advantage: float
    weight: float


def shape(group: Group, rl: RLConfig) -> np.ndarray:
    """Return the rewards less what too long answers cost, as DAPO has it (arXiv 2503.14476, eq. 13), [answers].

    Of the last rl.overlong_buffer tokens that an answer may have, each costs the same, and all of them 1.
    """
    rewards = np.array(group.rewards)
    if not rl.overlong_buffer:
        return rewards
    length = np.array([len(rollout.tokens) for rollout in group.rollouts])
    return rewards - (length - rl.max_new_tokens + rl.overlong_buffer).clip(0) / rl.overlong_buffer


def has_spread(group: Group, rl: RLConfig) -> bool:
    """Check whether the rewards differ, so that there is something to learn."""
    rewards = shape(group, rl)
    return bool(rewards.max() - rewards.min() > _NO_SPREAD)


def weigh(groups: Sequence[Group], rl: RLConfig) -> list[Answer]:
    """Return the answers to train on, with the loss of a step as the algorithm's paper writes it.

    grpo, gspo: the mean over answers of the mean over tokens. dr_grpo: the sum over tokens by answers x max_new_tokens.
    dapo: the mean over the tokens of groups with a spread. Groups without one have no advantages; they are left out
    unless there is a KL term.
    """
    kept = [group for group in groups if has_spread(group, rl) or rl.kl]
    num_answers = sum(len(group.rollouts) for group in groups)
    num_tokens = sum(len(rollout.tokens) for group in kept for rollout in group.rollouts)
    answers = []
    for group in kept:
        for rollout, advantage in zip(group.rollouts, _advantages(group, rl), strict=True):
            divisor = {
                "grpo": num_answers * len(rollout.tokens),
                "gspo": num_answers * len(rollout.tokens),
                "dr_grpo": num_answers * rl.max_new_tokens,
                "dapo": num_tokens,
            }[rl.algorithm]
            answers.append(Answer(group.prompt.tokens, rollout, advantage, 1 / divisor))
    return answers


def _advantages(group: Group, rl: RLConfig) -> list[float]:
    rewards = shape(group, rl)
    if not has_spread(group, rl):
        return [0.0] * len(rewards)
    above = rewards - rewards.mean()
    # Dr. GRPO does not divide: it would weigh prompts whose rewards hardly differ more.
    return (above if rl.algorithm == "dr_grpo" else above / rewards.std()).tolist()
