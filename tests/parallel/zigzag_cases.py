"""Rows of zigzag micro-batches, found by loops, and a rearrangement on every rank."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.routes import reroute
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.parallel.traffic import Traffic

CHANNELS = 3
PADDING = -1
# Document lengths of each sequence of 48 tokens: shorter and longer than two tokens a rank, cut at edges and elsewhere.
BATCHES = {
    "one": [[48]],
    "two sequences": [[48], [48]],
    "over all ranks": [[13, 22, 13]],
    "no padding": [[16, 32], [8, 40]],
    "short ones": [[1, 2, 3, 5, 7, 11, 13, 6], [48]],
    "one token each": [[1] * 48],
    "uneven": [[6, 6, 12, 24], [1, 46, 1], [5, 43]],
}


def starts_of(lengths: list[list[int]]) -> np.ndarray:
    """Return document starts, bool [B, E]."""
    starts = np.zeros((len(lengths), sum(lengths[0])), dtype=bool)
    for row, documents in zip(starts, lengths, strict=True):
        row[np.cumsum([0, *documents[:-1]])] = True
    return starts


def is_packed(lengths: list[list[int]], size: int) -> bool:
    """Check whether sequences must be packed: documents start inside, or two chunks a rank do not divide them."""
    return any(len(documents) > 1 for documents in lengths) or sum(lengths[0]) % (2 * size) > 0


def rows_before(lengths: list[list[int]], size: int, tensor_size: int, zigzag: bool) -> list[list[int]]:
    """Return the tokens in the rows of every rank's hidden states [L, B]."""
    length = sum(lengths[0])
    parts = []
    for rank in range(size):
        columns = ContextShard(rank, size, zigzag).columns(length)
        parts += cut([b * length + int(column) for column in columns for b in range(len(lengths))], tensor_size)
    return parts


def rows_after(lengths: list[list[int]], size: int, tensor_size: int) -> list[list[int]]:
    """Return the tokens in the rows of every rank in zigzag order."""
    if not is_packed(lengths, size):
        return rows_before(lengths, size, tensor_size, zigzag=True)
    parts: list[list[int]] = [[] for _ in range(size)]
    first, padded = 0, False
    for number in (number for documents in lengths for number in documents):
        chunk = -(-number // (2 * size))
        tokens = [*range(first, first + number), *[PADDING] * (2 * size * chunk - number)]
        for rank, part in enumerate(parts):
            mirrored = 2 * size - 1 - rank
            part += tokens[rank * chunk : (rank + 1) * chunk] + tokens[mirrored * chunk : (mirrored + 1) * chunk]
        first, padded = first + number, padded or len(tokens) > number
    while padded or len(parts[0]) % tensor_size:
        for part in parts:
            part += [PADDING, PADDING]
        padded = False
    return [piece for part in parts for piece in cut(part, tensor_size)]


def cut(rows: list[int], pieces: int) -> list[list[int]]:
    """Return equal consecutive pieces of the rows."""
    assert len(rows) % pieces == 0
    each = len(rows) // pieces
    return [rows[piece * each : (piece + 1) * each] for piece in range(pieces)]


def values_of(numbers: list[int], channels: int = CHANNELS) -> Tensor:
    """Return rows [R, c] that identify tokens; zeros for padding."""
    row = torch.tensor(numbers, dtype=torch.float64) + 1
    return row[:, None] * 10.0 ** torch.arange(channels)


def run_routes(batches: list[list[list[int]]], context: int, zigzag: bool) -> list[tuple]:
    """Return for each batch the rows there and back, the gradient, and the traffic of both directions.

    Ranks beyond the context group form the tensor group, with sequence parallelism.
    """
    groups = init_groups(tensor=dist.get_world_size() // context, context=context)
    group, rank = (groups.tp_cp, groups.tp_cp.rank()) if groups.tp.size() > 1 else (groups.cp, groups.cp.rank())
    results = []
    for lengths in batches:
        layout = TokenLayout.from_starts(starts_of(lengths), shard=ContextShard(groups.cp.rank(), context, zigzag))
        route = layout.to_zigzag(groups.tp.rank(), groups.tp.size()).route
        x_Rc = values_of(rows_before(lengths, context, groups.tp.size(), zigzag)[rank]).requires_grad_()
        with Traffic() as forward:
            there = reroute(x_Rc, route, group)
        back = reroute(there, route.back, group)
        weight = torch.randn(there.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        with Traffic() as backward:
            (there * weight).sum().backward()
        results.append((there.detach(), back.detach(), x_Rc.grad, weight, forward, backward))
    return results
