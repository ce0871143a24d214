"""The answers of all ranks, each of which has generated a share of them, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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


def gather(
    mine: Sequence[Scored] | None,
    count: int,
    groups: ProcessGroupCollection,
    device: str,
    picks_shape: tuple[int, int] | None = None,
) -> list[Scored]:
    """Return the answers to all `count` prompts, in their order; an empty list where a rank's rewards have failed.

    Collective over all ranks. mine: of own_numbers; None where a reward has failed. The first tensor rank's rewards
    count: those of the others are not used, and neither are their answers, which are the same.
    picks_shape: of the partitions picked for a token, where they come with the answers.
    """
    parts = _exchange(np.concatenate(([mine is not None], _encode(mine or []))), groups, device)
    if not all(part[0] for part in parts):
        return []
    size = groups.dp_cp.size()
    shares = [_decode(part[1:], len(range(rank, count, size))) for rank, part in enumerate(parts)]
    if picks_shape is not None:
        own = [rollout.picks_RMP for rollouts, _ in mine or [] for rollout in rollouts]
        # Not every backend sends int16.
        flat = np.concatenate([np.zeros(0, np.int16), *(x.ravel() for x in own if x is not None)]).view(np.uint8)
        picked = _exchange(flat, groups, device)
        shares = [_add_picks(*each, picks_shape) for each in zip(shares, picked, strict=True)]
    return [shares[number % size][number // size] for number in range(count)]


def _exchange(values: np.ndarray, groups: ProcessGroupCollection, device: str) -> list[np.ndarray]:
    """Return the values of each data and context rank, as its first tensor rank has them."""
    ranks = groups.dp_cp
    sizes = _gather_first(torch.tensor([len(values)], device=device), groups).tolist()
    padded = np.zeros(max(sizes), dtype=values.dtype)
    # Where tensor ranks differ, the first one's sizes count.
    padded[: len(values)] = values[: len(padded)]
    parts = _gather_first(to_device(padded, device), groups).view(ranks.size(), -1).cpu().numpy()
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _gather_first(values: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    found = values.new_empty(groups.dp_cp.size() * len(values))
    dist.all_gather_into_tensor(found, values, group=groups.dp_cp)
    if groups.tp.size() > 1:
        dist.broadcast(found, group=groups.tp, group_src=0)
    return found


def _encode(scored: Sequence[Scored]) -> np.ndarray:
    """Return all as fp64, which holds tokens exactly: of each group its size, and of each answer reward, is_cut,
    length, tokens that have picks, tokens, and log-probabilities."""
    parts: list[np.ndarray] = []
    for rollouts, rewards in scored:
        parts.append(np.array([len(rollouts)], dtype=np.float64))
        for rollout, reward in zip(rollouts, rewards, strict=True):
            num_picks = 0 if rollout.picks_RMP is None else len(rollout.picks_RMP)
            head = [reward, rollout.is_cut, len(rollout.tokens), num_picks]
            parts.append(np.array([*head, *rollout.tokens], dtype=np.float64))
            parts.append(rollout.logp_T.astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)


def _decode(values: np.ndarray, count: int) -> list[Scored]:
    """Return the first `count` groups that _encode has written; of their picks there is only room."""
    place, found = 0, []
    for _ in range(count):
        size, place = int(values[place]), place + 1
        rollouts, rewards = [], []
        for _ in range(size):
            reward, is_cut, length, num_picks = values[place : place + 4]
            begin, middle, place = place + 4, place + 4 + int(length), place + 4 + 2 * int(length)
            tokens = values[begin:middle].astype(np.int64).tolist()
            room = np.empty((int(num_picks), 0, 0), np.int16) if num_picks else None
            rollouts.append(Rollout(tokens, values[middle:place].copy(), bool(is_cut), room))
            rewards.append(float(reward))
        found.append((rollouts, rewards))
    return found


def _add_picks(share: list[Scored], flat: np.ndarray, shape: tuple[int, int]) -> list[Scored]:
    """Return a rank's answers with their picks."""
    picks = flat.view(np.int16).reshape(-1, *shape)
    begin, found = 0, []
    for rollouts, rewards in share:
        filled = []
        for rollout in rollouts:
            assert rollout.picks_RMP is not None
            end = begin + len(rollout.picks_RMP)
            filled.append(replace(rollout, picks_RMP=picks[begin:end].copy()))
            begin = end
        found.append((filled, rewards))
    return found
