"""Comparing the weights of replicas: data- and context-parallel ranks, which hold the same ones bit by bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Checksums of all weights, and the ranks that have them.
Holders = tuple[tuple[int, ...], list[int]]

_INTEGERS = {2: torch.int16, 4: torch.int32}


def compare_replicas(model_chunks: list[torch.nn.Module], group: ProcessGroup) -> str | None:
    """Return which ranks hold other weights than most, and the first such weight; None where all are the same.

    group: the ranks that hold the same weights. Collective over it; the result is the same on all of them.
    """
    if group.size() == 1:
        return None
    weights = {_name(parameter): parameter for chunk in model_chunks for parameter in chunk.parameters()}
    mine_w = torch.stack([checksum(weight.detach()) for weight in weights.values()])
    all_rw = mine_w.new_empty(group.size() * len(mine_w))
    dist.all_gather_into_tensor(all_rw, mine_w, group=group)
    rows = all_rw.view(group.size(), -1).tolist()
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, row in zip(dist.get_process_group_ranks(group), rows, strict=True):
        holders[tuple(row)].append(rank)
    usual, *others = sorted(holders.items(), key=lambda item: -len(item[1]))
    if not others:
        return None
    return "; ".join(_describe(list(weights), usual, other) for other in others)


def _name(parameter: Any) -> str:
    """Return a parameter's name in the complete model."""
    return parameter.weight.name


def checksum(weight: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, taken as integers: int64, on its device."""
    return weight.view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64)


def _describe(
    names: list[str], usual: tuple[tuple[int, ...], list[int]], other: tuple[tuple[int, ...], list[int]]
) -> str:
    wrong = [name for name, a, b in zip(names, usual[0], other[0], strict=True) if a != b]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{_ranks(other[1])} against {_ranks(usual[1])} in {wrong[0]}{more}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
