"""The answers of all ranks, each of which has generated a share of them, on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.parallel.device import to_device
from megatron_sse.rl.rollouts import Rollout

# A prompt's answers with their rewards.
Scored = tuple[list[Rollout], list[float]]


def own_numbers(count: int, ranks: dist.ProcessGroup) -> list[int]:
    """Return which of `count` prompts this data and context rank answers."""
    return list(range(ranks.rank(), count, ranks.size()))


def gather(mine: Sequence[Scored] | None, count: int, groups: ProcessGroupCollection, device: str) -> list[Scored]:
    """Return the answers to all `count` prompts, in their order; an empty list where a rank's rewards have failed.

    Collective over all ranks. mine: of own_numbers; None where a reward has failed. The first tensor rank's rewards
    count: those of the others are not used, and neither are their answers, which are the same.
    """
    ranks, tensor = groups.dp_cp, groups.tp
    own = torch.tensor([0, 0] if mine is None else [1, _size(mine)], device=device)
    all_sizes = own.new_empty(2 * ranks.size())
    dist.all_gather_into_tensor(all_sizes, own, group=ranks)
    if tensor.size() > 1:
        dist.broadcast(all_sizes, group=tensor, group_src=0)
    sizes = all_sizes.view(-1, 2).tolist()
    if not all(is_good for is_good, _ in sizes):
        return []
    # fp64 holds tokens exactly, and log-probabilities of fp32 and fp64 models.
    longest = max(size for _, size in sizes)
    values = to_device(np.concatenate((_encode(mine or []), np.zeros(longest)))[:longest], device)
    all_values = values.new_empty(ranks.size() * longest)
    dist.all_gather_into_tensor(all_values, values, group=ranks)
    if tensor.size() > 1:
        dist.broadcast(all_values, group=tensor, group_src=0)
    parts = all_values.view(ranks.size(), longest).cpu().numpy()
    shares = [_decode(part, len(range(rank, count, ranks.size()))) for rank, part in enumerate(parts)]
    return [shares[number % ranks.size()][number // ranks.size()] for number in range(count)]


def _size(scored: Sequence[Scored]) -> int:
    return sum(1 + sum(3 + 2 * len(rollout.tokens) for rollout in rollouts) for rollouts, _ in scored)


def _encode(scored: Sequence[Scored]) -> np.ndarray:
    """Return all as fp64: of each group its size, and of each answer reward, is_cut, length, tokens, and logp."""
    parts: list[np.ndarray] = []
    for rollouts, rewards in scored:
        parts.append(np.array([len(rollouts)], dtype=np.float64))
        for rollout, reward in zip(rollouts, rewards, strict=True):
            parts.append(np.array([reward, rollout.is_cut, len(rollout.tokens), *rollout.tokens], dtype=np.float64))
            parts.append(rollout.logp_T.astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)


def _decode(values: np.ndarray, count: int) -> list[Scored]:
    """Return the first `count` groups that _encode has written."""
    place, found = 0, []
    for _ in range(count):
        size, place = int(values[place]), place + 1
        rollouts, rewards = [], []
        for _ in range(size):
            reward, is_cut, length = values[place : place + 3]
            begin, middle, place = place + 3, place + 3 + int(length), place + 3 + 2 * int(length)
            tokens = values[begin:middle].astype(np.int64).tolist()
            rollouts.append(Rollout(tokens, values[middle:place].copy(), bool(is_cut)))
            rewards.append(float(reward))
        found.append((rollouts, rewards))
    return found
