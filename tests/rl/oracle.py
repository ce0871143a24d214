"""GRPO and its relatives token by token in fp64, as the papers write them: what decides which loss is right.

Each document is a prompt that is not looked at and an answer of which every token has a log-probability. Nothing is
packed, cut or batched here, and nothing is shared with megatron_sse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Answer:
    """An answer of a group: log-probabilities of its tokens, fp64 [tokens], now, when it was generated, and of the
    reference; reward."""

    now: Tensor
    old: list[float]
    reference: list[float]
    reward: float


@dataclass(frozen=True)
class Settings:
    """algorithm: grpo, dr_grpo, dapo or gspo. longest: tokens that an answer may have. buffer: DAPO's L_cache."""

    algorithm: str
    low: float = 0.2
    high: float = 0.2
    kl: float = 0.0
    longest: int = 16
    buffer: int = 0


def reward(answer: Answer, settings: Settings) -> float:
    """Return the reward with DAPO's soft punishment of overlong answers (2503.14476, eq. 13)."""
    length, free = len(answer.now), settings.longest - settings.buffer
    if length <= free:
        return answer.reward
    return answer.reward + (free - length) / settings.buffer if length <= settings.longest else answer.reward - 1


def advantages(group: list[Answer], settings: Settings) -> list[float]:
    """Return each answer's advantage over its group.

    GRPO (arXiv 2402.03300, 4.1.2): (r - mean) / std. Dr. GRPO (2503.20783, 3.2): without the division.
    """
    rewards = [reward(answer, settings) for answer in group]
    mean = sum(rewards) / len(group)
    variance = sum((each - mean) ** 2 for each in rewards) / len(group)
    if variance == 0:
        return [0.0] * len(group)
    divisor = 1.0 if settings.algorithm == "dr_grpo" else variance**0.5
    return [(each - mean) / divisor for each in rewards]


def loss(groups: list[list[Answer]], settings: Settings) -> Tensor:
    """Return what is minimised, fp64; differentiable in the answers' `now`."""
    sequences = sum(len(group) for group in groups)
    total = torch.zeros((), dtype=torch.float64)
    # DAPO (2503.14476, eq. 8 to 11) leaves out groups without a spread, and weighs all tokens that stay alike.
    kept = [any(advantages(group, settings)) or settings.kl > 0 for group in groups]
    tokens = sum(len(answer.now) for group, stays in zip(groups, kept, strict=True) if stays for answer in group)
    for group, stays in zip(groups, kept, strict=True):
        for answer, advantage in zip(group, advantages(group, settings), strict=True):
            length = len(answer.now)
            ratio_of_sequence = torch.zeros((), dtype=torch.float64)
            for place in range(length):
                ratio_of_sequence = ratio_of_sequence + (answer.now[place] - answer.old[place]) / length
            for place in range(length):
                if settings.algorithm == "gspo":
                    # GSPO (2507.18071, eq. 7): one ratio for all of an answer, the geometric mean of its tokens'.
                    gain = clipped(ratio_of_sequence.exp(), advantage, settings)
                else:
                    gain = clipped((answer.now[place] - answer.old[place]).exp(), advantage, settings)
                # The k3 estimate of the divergence from the reference (2402.03300, eq. 4).
                away = answer.reference[place] - answer.now[place]
                value = gain - settings.kl * (away.exp() - away - 1)
                if settings.algorithm == "dr_grpo":
                    total = total - value / (sequences * settings.longest)
                elif settings.algorithm == "dapo":
                    total = total - (value / tokens if stays else 0.0)
                else:
                    total = total - value / (sequences * length)
    return total


def clipped(ratio: Tensor, advantage: float, settings: Settings) -> Tensor:
    """Return the smaller of the gain with the ratio as it is and with the ratio kept near 1."""
    near = min(max(float(ratio.detach()), 1 - settings.low), 1 + settings.high)
    free = ratio * advantage
    # The bounds have no gradient; inside them both are the same.
    return free if float(free.detach()) <= near * advantage else torch.tensor(near * advantage, dtype=torch.float64)
