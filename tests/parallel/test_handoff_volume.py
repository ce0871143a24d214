"""Costs of a hand-off: bytes by the formula, and collectives and memory that do not grow with the ranks."""

from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_sse.parallel.handoff import ALGORITHMS, HandOff
from megatron_sse.parallel.handoff_bytes import handoff_bytes
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.parallel.traffic import Traffic
from tests.parallel.handoff_cases import Case, exclusive_scan, make_hand_off, own_slots
from tests.workers import WorkerError, run_workers

CASES = [
    Case(size=size, algorithm=algorithm, matrix=matrix, zigzag=zigzag, dtype=torch.float32)
    for size, algorithm, matrix, zigzag in product((2, 4), ALGORITHMS, (False, True), (False, True))
]


def counted(case: Case) -> tuple[Traffic, Traffic]:
    own = own_slots(case, dist.get_rank())
    hand_off = make_hand_off(case)
    with Traffic() as forward:
        entering = exclusive_scan(own.transition, own.state, hand_off)
    with Traffic() as backward:
        (entering * own.weight).sum().backward()
    return forward, backward


def sent(case: Case) -> tuple[int, int]:
    forward, backward = counted(case)
    return forward.sent.total(), backward.sent.total()


def calls(case: Case) -> tuple[Counter[str], Counter[str]]:
    forward, backward = counted(case)
    return forward.calls, backward.calls


def formula(case: Case, rank: int) -> tuple[int, int]:
    return handoff_bytes(
        case.chain,
        rank,
        case.units,
        case.key_dim,
        case.value_dim,
        case.matrix,
        case.algorithm,
        element_bytes=case.dtype.itemsize,
        wire_bytes=case.wire.itemsize if case.wire else None,
        node_size=case.node_size,
    )


@pytest.mark.parametrize(
    "case", [*CASES, Case(size=8, zigzag=True), Case(size=8, algorithm="two_level", node_size=4, zigzag=True)], ids=str
)
def test_bytes_are_those_of_the_formula(case: Case) -> None:
    assert run_workers(case.size, sent, case) == [formula(case, rank) for rank in range(case.size)]


@pytest.mark.parametrize("algorithm", ["exscan", "two_level"])
def test_bytes_on_four_machines(algorithm: str) -> None:
    """Sixteen ranks, with collectives that count and do not send."""
    case = Case(size=16, algorithm=algorithm, node_size=4, zigzag=True, dtype=torch.float32)
    for rank in (0, 5, 15):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case.size)
        try:
            assert sent(case) == formula(case, rank)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("case", [case for case in CASES if case.size == 4 and not case.matrix], ids=str)
def test_bytes_of_a_bf16_wire(case: Case) -> None:
    narrow = replace(case, wire=torch.bfloat16)
    by_rank = run_workers(case.size, sent, narrow)
    assert by_rank == [formula(narrow, rank) for rank in range(case.size)]
    assert [2 * backward for _, backward in by_rank] == [formula(case, rank)[1] for rank in range(case.size)]


@pytest.mark.parametrize(
    ("algorithm", "forward", "backward"),
    [
        ("exscan", {"alltoall_base_": 2}, {"alltoall_base_": 2}),
        ("allgather", {"_allgather_base_": 1}, {"_allgather_base_": 1}),
        ("two_level", {"alltoall_base_": 4}, {"alltoall_base_": 4}),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_collectives_do_not_grow_with_the_ranks(
    algorithm: str, forward: dict[str, int], backward: dict[str, int], size: int
) -> None:
    case = Case(size=size, zigzag=True, matrix=True, algorithm=algorithm)
    assert run_workers(size, calls, case) == [(forward, backward)] * size


def test_one_rank_sends_nothing() -> None:
    case = Case(size=1, zigzag=True)
    assert run_workers(1, calls, case) == [({}, {})]
    assert formula(case, 0) == (0, 0)


@pytest.mark.parametrize("matrix", [False, True])
def test_bytes_of_exscan_do_not_grow_with_the_ranks(matrix: bool) -> None:
    """On n ranks, exscan sends (n - 1) / n of twice the states and once the transitions."""
    units, key_dim, value_dim = 5 * 1024, 128, 128
    states = 4 * units * key_dim * value_dim
    transitions = states * (key_dim if matrix else 1) // value_dim
    for size in (2, 4, 8, 64, 1024):
        chain = ContextShard(0, size).chain
        forward, backward = handoff_bytes(chain, 0, units, key_dim, value_dim, matrix)
        assert forward == (2 * states + transitions) * (size - 1) // size
        assert backward == 2 * states * (size - 1) // size
        gathered, _ = handoff_bytes(chain, 0, units, key_dim, value_dim, matrix, "allgather")
        assert gathered == (states + transitions) * (size - 1)


def test_two_levels_send_an_eighth_between_nodes_of_eight_ranks() -> None:
    inside = handoff_bytes(ContextShard(0, 8).chain, 0, 17 * 16, 128, 128, False)[0]
    for size in (64, 256):
        chain = ContextShard(0, size).chain
        between = handoff_bytes(chain, 0, 17 * 16, 128, 128, False, "two_level", node_size=8)[0] - inside
        whole = handoff_bytes(chain, 0, 17 * 16, 128, 128, False)[0]
        assert between == pytest.approx(whole * (size - 8) / (size - 1) / 8, rel=1e-2)


class LiveMemory(TorchDispatchMode):
    """A mode that tracks the bytes of live tensors created inside it; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_iter(args) if isinstance(x, torch.Tensor)}
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor) and StorageWeakRef(x.untyped_storage()) not in given:
                self._live[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def filled(output: torch.Tensor, *_: Any, **__: Any) -> Any:
    output.zero_()
    return SimpleNamespace(wait=lambda: None)


def peak_memory(case: Case) -> tuple[float, float, float]:
    """Return memory of forward, between passes, and backward, above the start, in units of one rank's states.

    Collectives only fill their outputs here: gloo's threads hold on to buffers for a while.
    """
    own = own_slots(case, 0)
    group: Any = SimpleNamespace(size=lambda: case.size, rank=lambda: 0)
    hand_off = HandOff(case.chain, group, case.algorithm)
    fill = dict.fromkeys(("all_to_all_single", "all_gather_into_tensor"), filled)
    with mock.patch.multiple(dist, **fill), LiveMemory() as memory:
        entering = exclusive_scan(own.transition, own.state, hand_off)
        forward, memory.peak = memory.peak, 0
        torch.empty(0)
        kept, memory.peak = memory.peak, 0
        entering.backward(own.weight)
    return forward / own.state.nbytes, kept / own.state.nbytes, memory.peak / own.state.nbytes


@pytest.mark.parametrize("matrix", [False, True])
def test_memory_of_exscan_does_not_grow_with_the_ranks(matrix: bool) -> None:
    case = Case(matrix=matrix, zigzag=True, units=64, key_dim=16, value_dim=16)
    peaks = {size: peak_memory(replace(case, size=size)) for size in (2, 4, 8, 64)}
    for size in (4, 8, 64):
        assert all(larger <= smaller for larger, smaller in zip(peaks[size], peaks[2], strict=True)), peaks
    # Entering states and this rank's part of the transitions are kept; here matrices are as large as states.
    forward, kept, backward = peaks[2]
    assert kept == (2 if matrix else 1 + 1 / 16)
    assert forward < (4.6 if matrix else 3.2) and backward < (5.1 if matrix else 4.2), peaks


def test_memory_of_allgather_grows_with_the_ranks() -> None:
    case = Case(algorithm="allgather", units=16, key_dim=16, value_dim=16)
    assert peak_memory(replace(case, size=4))[0] > 1.5 * peak_memory(replace(case, size=2))[0]


def unknown_collective() -> None:
    with Traffic():
        dist.broadcast(torch.zeros(1), 0)


def test_traffic_does_not_guess() -> None:
    with pytest.raises(WorkerError, match="no count of bytes for broadcast_"):
        run_workers(2, unknown_collective)


def other_collectives() -> Traffic:
    size = dist.get_world_size()
    with Traffic() as traffic:
        dist.all_reduce(torch.zeros(size))
        dist.reduce_scatter_tensor(torch.zeros(3), torch.zeros(3 * size))
        splits = [[0, 2], [3, 1]][dist.get_rank()]
        dist.all_to_all_single(
            torch.zeros(3, 5), torch.zeros(sum(splits), 5), [[0, 3], [2, 1]][dist.get_rank()], splits
        )
    return traffic


def other_bytes() -> Counter[str]:
    return other_collectives().sent


def test_traffic_of_other_collectives() -> None:
    first, second = run_workers(2, other_bytes)
    assert first == {"allreduce_": 8, "_reduce_scatter_base_": 12, "alltoall_base_": 2 * 5 * 4}
    assert second == {"allreduce_": 8, "_reduce_scatter_base_": 12, "alltoall_base_": 3 * 5 * 4}
