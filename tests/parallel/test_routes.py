"""Tokens rearranged over ranks: rows, gradients and bytes against loops in one process."""

import numpy as np
import pytest
import torch

from megatron_sse.parallel.routes import make_route
from tests.parallel.zigzag_cases import (
    BATCHES,
    CHANNELS,
    PADDING,
    rows_after,
    rows_before,
    run_routes,
    values_of,
)
from tests.workers import run_workers

# World and context size; the other ranks are tensor ranks with sequence parallelism.
WORLDS = [(2, 2), (4, 4), (4, 2)]


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize(("world_size", "context"), WORLDS)
def test_rows_gradients_and_bytes(world_size: int, context: int, zigzag: bool) -> None:
    by_rank = run_workers(world_size, run_routes, list(BATCHES.values()), context, zigzag)
    for number, (name, lengths) in enumerate(BATCHES.items()):
        before = rows_before(lengths, context, world_size // context, zigzag)
        after = rows_after(lengths, context, world_size // context)
        results = [results[number] for results in by_rank]
        # A token's destination determines its gradient.
        token_grad = torch.zeros(sum(map(sum, lengths)), CHANNELS, dtype=torch.float64)
        for rows, result in zip(after, results, strict=True):
            real = torch.tensor(rows) != PADDING
            token_grad[torch.tensor(rows)[real]] = result[3][real]
        for rank, (there, back, grad, _, forward, backward) in enumerate(results):
            assert torch.equal(there, values_of(after[rank])), name
            assert torch.equal(back, values_of(before[rank])), name
            assert torch.equal(grad, token_grad[before[rank]]), name
            leave = len(set(before[rank]) - set(after[rank]))
            arrive = len(set(after[rank]) - set(before[rank]) - {PADDING})
            assert forward.calls == backward.calls == {"alltoall_base_": 1}
            assert forward.sent["alltoall_base_"] == 8 * CHANNELS * leave, name
            assert backward.sent["alltoall_base_"] == 8 * CHANNELS * arrive, name


@pytest.mark.parametrize("seed", range(5))
def test_any_rearrangement(seed: int) -> None:
    """Any rearrangement equals rows moved by hand: unequal ranks, some without rows, padding on both sides."""
    random = np.random.default_rng(seed)
    tokens, size = 40, 5
    before, after = (
        [scatter_padding(random, part) for part in np.split(random.permutation(tokens), sorted(cuts))]
        for cuts in random.integers(0, tokens, (2, size - 1))
    )
    routes = [make_route(before, after, rank) for rank in range(size)]
    for there, ways in ((after, routes), (before, [route.back for route in routes])):
        origin = before if there is after else after
        sent = [
            torch.from_numpy(rows)[way.send_rows].split(way.send_sizes) for rows, way in zip(origin, ways, strict=True)
        ]
        for rank, way in enumerate(ways):
            rows = torch.full((way.num_rows_after,), PADDING)
            parts = [sent[sender][rank] for sender in range(size)]
            assert [len(part) for part in parts] == way.receive_sizes
            rows[way.receive_rows] = torch.cat(parts)
            assert rows.tolist() == there[rank].tolist()


def scatter_padding(random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    return np.insert(rows, random.integers(0, len(rows) + 1, 3), PADDING)


@pytest.mark.parametrize("after", [[[0, 1], [1]], [[0], [1]], [[0, 1], [3]]], ids=["twice", "lost", "unknown"])
def test_rows_that_are_not_the_same_tokens(after: list[list[int]]) -> None:
    before = [np.array([0, 1]), np.array([2])]
    with pytest.raises(AssertionError):
        make_route(before, [np.array(rows) for rows in after], 0)
