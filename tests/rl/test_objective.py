"""The loss and its gradient against the oracle in fp64, on one rank and in the parts of context ranks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.config.rl import RLConfig
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.linear_cross_entropy import TokenScores
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.rl.advantages import weigh
from megatron_sse.rl.objective import PolicyObjective
from megatron_sse.rl.packing import make_batches, pack
from tests.rl import oracle
from tests.rl.support import LENGTH, make_groups
from tests.workers import run_workers

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo with a reference": {"kl": 0.1},
    "other bounds": {"clip": 0.05, "clip_high": 0.4},
    "dr_grpo": {"algorithm": "dr_grpo"},
    "dapo": {"algorithm": "dapo"},
    "dapo, overlong": {"algorithm": "dapo", "overlong_buffer": 7},
    "dapo with a reference": {"algorithm": "dapo", "kl": 0.2},
    "gspo": {"algorithm": "gspo", "clip": 0.1, "kl": 0.05},
}


def settings(case: dict[str, Any]) -> RLConfig:
    return RLConfig.model_validate(
        {"prompts": "p", "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 12} | case
    )


def expected(case: dict[str, Any]) -> tuple[float, list[list[Tensor]]]:
    """Return the oracle's loss, and its gradient by each token's log-probability, for every answer of every group."""
    rl, draw = settings(case), np.random.default_rng(1)
    groups = []
    for group in make_groups():
        answers = []
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            now, away = moved(rollout.logp_T, draw)
            answers.append(oracle.Answer(now, rollout.logp_T.tolist(), away.tolist(), reward))
        groups.append(answers)
    high = {"dapo": 0.28}.get(rl.algorithm, rl.clip) if rl.clip_high is None else rl.clip_high
    loss = oracle.loss(
        groups, oracle.Settings(rl.algorithm, rl.clip, high, rl.kl, rl.max_new_tokens, rl.overlong_buffer)
    )
    loss.backward()
    # An answer that is left out has no gradient.
    gradients = [
        [torch.zeros_like(answer.now) if answer.now.grad is None else answer.now.grad for answer in group]
        for group in groups
    ]
    return loss.item(), gradients


def moved(old_T: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Return log-probabilities near those before: now, with a gradient, and of the reference."""
    now = torch.tensor(old_T.astype(np.float64) + draw.normal(0, 0.3, len(old_T)), requires_grad=True)
    return now, old_T.astype(np.float64) + draw.normal(0, 0.3, len(old_T))


def ours(case: dict[str, Any], zigzag: bool) -> tuple[float, dict[tuple[int, int, int], float]]:
    """Return this rank's part of the loss, and of its gradient by group, answer and token."""
    groups = init_groups(context=torch.distributed.get_world_size())
    rl, draw, made = settings(case), np.random.default_rng(1), make_groups()
    values = {}
    for number, group in enumerate(made):
        for sample, rollout in enumerate(group.rollouts):
            now, away = moved(rollout.logp_T, draw)
            values[number, sample] = now.detach(), away
    answers = weigh(made, rl)
    names = {id(rollout): (n, s) for n, group in enumerate(made) for s, rollout in enumerate(group.rollouts)}
    rows = pack(answers, LENGTH)
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), zigzag)
    objective = PolicyObjective(rl, groups.cp)
    total, found, tokens = 0.0, {}, sum(len(answer.rollout.tokens) for answer in answers)
    for batch, held in zip(
        make_batches(rows, LENGTH, 1, 0, 1, shard, "cpu", np.float64), [[row] for row in rows], strict=True
    ):
        logp_BE, reference_BE = torch.full((2, 1, LENGTH), float("nan"), dtype=torch.float64)
        owner: list[tuple[int, int, int] | None] = [None] * LENGTH
        place = 0
        for answer in held[0]:
            begin = place + len(answer.prompt)
            now, away = values[names[id(answer.rollout)]]
            # The label at place p is the token at p + 1.
            logp_BE[0, begin - 1 : begin - 1 + len(now)] = now
            reference_BE[0, begin - 1 : begin - 1 + len(now)] = torch.from_numpy(away)
            for token in range(len(now)):
                owner[begin - 1 + token] = (*names[id(answer.rollout)], token)
            place = begin + len(now)
        column_L = shard.columns(LENGTH)
        nll_BL = (-logp_BE[:, column_L]).requires_grad_()
        batch = replace(batch, reference_BL=reference_BE[:, column_L] if rl.kl else None)
        result = objective.loss(TokenScores(nll_BL, None), batch)
        result.loss.backward()
        total += result.loss.item() / tokens
        assert nll_BL.grad is not None and torch.isfinite(nll_BL.grad).all()
        for column, gradient in zip(column_L.tolist(), nll_BL.grad[0].tolist(), strict=True):
            if owner[column] is not None:
                found[owner[column]] = -gradient / tokens
            else:
                assert gradient == 0
    return total, found


@pytest.mark.parametrize("world_size", [1, 2])
def test_like_the_oracle(world_size: int) -> None:
    for name, case in CASES.items():
        loss, gradients = expected(case)
        for zigzag in {False, world_size > 1}:
            parts = run_workers(world_size, ours, case, zigzag)
            assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-10), name
            found = {key: value for _, part in parts for key, value in part.items()}
            wanted = {
                (number, sample, token): value
                for number, group in enumerate(gradients)
                for sample, gradient in enumerate(group)
                for token, value in enumerate(gradient.tolist())
            }
            # Groups without a spread may have been left out.
            assert {key: found.get(key, 0.0) for key in wanted} == pytest.approx(wanted, rel=1e-10, abs=1e-14), name
