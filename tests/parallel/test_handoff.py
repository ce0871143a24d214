"""Hand-off over ranks equals a serial fold, with gradients, for every algorithm, and injected bugs are seen."""

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sse.config.schema import ParallelConfig
from megatron_sse.kernels.scan import apply_transition
from megatron_sse.parallel.handoff import ALGORITHMS, HandOff
from megatron_sse.parallel.sharding import ContextShard
from tests.parallel.handoff_cases import (
    Case,
    exclusive_scan,
    in_chain_order,
    make_hand_off,
    own_slots,
    scan_over_ranks,
    serial_fold,
    whole_chain,
    worst_error,
)
from tests.workers import WorkerError, run_workers

KINDS_AND_CHAINS = [{"matrix": matrix, "zigzag": zigzag} for matrix, zigzag in product((False, True), repeat=2)]

GRID = [
    Case(size=size, algorithm=algorithm, resets=resets, **kind)
    for size, algorithm, resets, kind in product((2, 4), ALGORITHMS, ("none", "some", "all"), KINDS_AND_CHAINS)
]
EIGHT_RANKS = [
    *(Case(size=8, resets="some", **kind) for kind in KINDS_AND_CHAINS),
    *(Case(size=8, algorithm="two_level", node_size=4, **kind) for kind in KINDS_AND_CHAINS),
]
ODD_SHAPES = {
    "fewer units than ranks": Case(size=4, matrix=True, units=1),
    "fewer channels than ranks": Case(size=4, units=1, key_dim=3, zigzag=True),
    "fewer units than ranks of a node": Case(size=4, algorithm="two_level", node_size=4, matrix=True, units=1),
    "nodes of one rank": Case(size=4, algorithm="two_level", node_size=1, zigzag=True, matrix=True),
    "rows that divide": Case(size=4, units=4, key_dim=4, zigzag=True),
    "one channel": Case(size=2, key_dim=1, value_dim=1),
}


@pytest.mark.parametrize("case", [*GRID, *EIGHT_RANKS], ids=str)
def test_equals_a_serial_fold(case: Case) -> None:
    expected = serial_fold(whole_chain(case))
    assert worst_error(scan_over_ranks(case), expected) < 1e-12


def test_settings_allow_every_algorithm() -> None:
    assert get_args(ParallelConfig.model_fields["hand_off"].annotation) == ("auto", *ALGORITHMS)


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_any_shape(name: str) -> None:
    expected = serial_fold(whole_chain(ODD_SHAPES[name]))
    assert worst_error(scan_over_ranks(ODD_SHAPES[name]), expected) < 1e-12


@pytest.mark.parametrize(
    "case", [Case(size=size, **kind) for size, kind in product((2, 4, 8), KINDS_AND_CHAINS)], ids=str
)
def test_the_cases_remember(case: Case) -> None:
    """The cases' gates remember: with gates that forget everything, no test would exercise the chain."""
    slots = whole_chain(case)
    entering, *_ = serial_fold(slots)
    arrived = apply_transition(slots.transition, entering)[1:]
    share = arrived.flatten(1).norm(dim=1) / (arrived + slots.state[1:]).flatten(1).norm(dim=1)
    assert share.min() > 0.1 and share.max() < 1


@pytest.mark.parametrize("kind", KINDS_AND_CHAINS, ids=str)
@pytest.mark.parametrize("algorithm", ["exscan", "allgather", "p2p"])
def test_one_rank_needs_no_group(kind: dict[str, bool], algorithm: str) -> None:
    case = Case(size=1, **kind)
    own = own_slots(case, 0)
    entering = exclusive_scan(own.transition, own.state, HandOff(case.chain, None, algorithm))
    (entering * own.weight).sum().backward()
    results = in_chain_order(case, [(entering.detach(), own.transition.grad, own.state.grad)])
    assert worst_error(results, serial_fold(whole_chain(case))) < 1e-12


def poisoned(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return entering states and gradients of states where the document before the last reset is not finite."""
    results = []
    for value in (0.0, torch.inf, torch.nan):
        own = own_slots(replace(case, resets="none"), dist.get_rank())
        places = [case.chain.index((dist.get_rank(), slot)) for slot in range(len(own.state))]
        before, at, after = (torch.tensor([sign(place) for place in places]) for sign in SIDES)
        transition, state = own.transition.detach(), own.state.detach()
        if value:
            transition[before], state[before] = value, value
        transition[at] = 0
        state.requires_grad_()
        entering = exclusive_scan(transition, state, make_hand_off(case))
        (entering[after] * own.weight[after]).sum().backward()
        assert state.grad is not None
        results.append((entering.detach()[after], state.grad[~before]))
    return results


# Before, at and after the slot of the chain in which the second document starts.
SIDES = (lambda place: place < 2, lambda place: place == 2, lambda place: place > 2)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_stops_at_a_reset(algorithm: str, matrix: bool, zigzag: bool) -> None:
    case = Case(size=4, algorithm=algorithm, matrix=matrix, zigzag=zigzag)
    for clean, *rest in run_workers(4, poisoned, case):
        for entering, grad in rest:
            assert torch.equal(entering, clean[0]) and torch.equal(grad, clean[1])


@pytest.mark.parametrize("zigzag", [False, True])
def test_algorithms_agree_bitwise_on_decays(zigzag: bool) -> None:
    """All algorithms sum in the same order, so results are bitwise equal wherever the sums are computed."""
    case = Case(size=4, zigzag=zigzag, dtype=torch.float32)
    by_algorithm = [scan_over_ranks(replace(case, algorithm=name)) for name in ("p2p", "exscan", "allgather")]
    for results in by_algorithm[1:]:
        assert worst_error(results, tuple(by_algorithm[0])) == 0


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_repeated_runs_are_bitwise_equal(algorithm: str, matrix: bool) -> None:
    case = Case(size=4, zigzag=True, matrix=matrix, algorithm=algorithm, dtype=torch.float32)
    assert worst_error(scan_over_ranks(case), tuple(scan_over_ranks(case))) == 0


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bf16_wire(algorithm: str, matrix: bool) -> None:
    """A bf16 wire rounds states when sent (p2p at every hop), never inside the fold, and no transitions."""
    sizes = {"units": 8, "key_dim": 16, "value_dim": 16}
    case = Case(size=4, zigzag=True, matrix=matrix, algorithm=algorithm, dtype=torch.float32, **sizes)
    results = scan_over_ranks(replace(case, wire=torch.bfloat16))
    expected = serial_fold(whole_chain(replace(case, dtype=torch.float64)))
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]
    assert all(1e-4 < error < 4e-3 for error in errors), errors


# --- in the middle of a training step ---


def several_in_flight(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run all forward passes before the first backward pass, as in a pipeline, each with data of its own."""
    owns = [own_slots(replace(case, seed=seed), dist.get_rank()) for seed in range(3)]
    enterings = [exclusive_scan(own.transition, own.state, make_hand_off(case)) for own in owns]
    for own, entering in zip(owns, enterings, strict=True):
        (entering * own.weight).sum().backward()
    return [(e.detach(), own.transition.grad, own.state.grad) for own, e in zip(owns, enterings, strict=True)]


@pytest.mark.parametrize("case", [case for case in GRID if case.size == 4 and case.resets == "some"], ids=str)
def test_several_micro_batches_in_flight(case: Case) -> None:
    by_rank = run_workers(case.size, several_in_flight, case)
    for seed, results in enumerate(zip(*by_rank, strict=True)):
        expected = serial_fold(whole_chain(replace(case, seed=seed)))
        assert worst_error(in_chain_order(case, list(results)), expected) < 1e-12


def recomputed(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    own = own_slots(case, dist.get_rank())
    hand_off = make_hand_off(case)
    twice = checkpoint(
        lambda a, s: exclusive_scan(a * 1, s * 1, hand_off), own.transition, own.state, use_reentrant=True
    )
    (twice * own.weight).sum().backward()
    return twice.detach(), own.transition.grad, own.state.grad


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_recomputed_in_backward(algorithm: str) -> None:
    case = Case(size=4, zigzag=True, matrix=True, algorithm=algorithm, resets="some")
    results = in_chain_order(case, run_workers(case.size, recomputed, case))
    assert worst_error(results, serial_fold(whole_chain(case))) < 1e-12


def in_a_subgroup(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Scan in groups of ranks 0 and 2, and 1 and 3, where group ranks differ from global ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    own = own_slots(replace(case, seed=dist.get_rank() % 2), group.rank())
    entering = exclusive_scan(own.transition, own.state, HandOff(case.chain, group, case.algorithm))
    (entering * own.weight).sum().backward()
    return entering.detach(), own.transition.grad, own.state.grad


@pytest.mark.parametrize("algorithm", ["exscan", "allgather", "p2p"])
def test_group_that_is_not_the_world(algorithm: str) -> None:
    case = Case(size=2, zigzag=True, algorithm=algorithm)
    by_rank = run_workers(4, in_a_subgroup, case)
    for seed in (0, 1):
        expected = serial_fold(whole_chain(replace(case, seed=seed)))
        assert worst_error(in_chain_order(case, by_rank[seed::2]), expected) < 1e-12


# --- injected bugs ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("bug", "case"),
    [
        ("not transposed", Case(size=4, matrix=True)),
        ("not transposed", Case(size=4, matrix=True, zigzag=True)),
        ("rank order", Case(size=4, zigzag=True)),
        ("rank order", Case(size=4, zigzag=True, matrix=True)),
        *(("skipped", Case(size=4, **kind)) for kind in KINDS_AND_CHAINS),
    ],
)
def test_bugs_are_seen(bug: str, case: Case, algorithm: str) -> None:
    case = replace(case, algorithm=algorithm)
    expected = serial_fold(whole_chain(case))
    results = scan_over_ranks(case, bug)
    assert worst_error(results, expected) > 1e-2
    if bug == "not transposed":
        # The forward pass is correct; only gradients are wrong.
        assert worst_error(results[:1], expected[:1]) < 1e-12


# --- refused ---

CONTIGUOUS = ContextShard(0, 1).chain
STATE = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("transition", "state", "wire", "message"),
    [
        (torch.zeros(1, 2, 3, 2), STATE, None, "transition must be"),
        (torch.zeros(1, 3, 3, 1), STATE, None, "transition must be"),
        (torch.zeros(1, 2, 3), STATE[..., 0], None, "transition must be"),
        (torch.zeros(2, 2, 3, 1), torch.zeros(2, 2, 3, 4), None, "1 slots on each rank"),
        (torch.zeros(1, 2, 3, 1).double(), STATE, None, "fp32 or fp64"),
        (torch.zeros(1, 2, 3, 1).half(), STATE.half(), None, "fp32 or fp64"),
        (torch.zeros(1, 2, 3, 1), STATE, torch.float16, "wire is torch.float16"),
        (torch.zeros(1, 2, 3, 1).double(), STATE.double(), torch.float32, "wire is torch.float32"),
    ],
)
def test_wrong_tensors(transition: Tensor, state: Tensor, wire: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exclusive_scan(transition, state, HandOff(CONTIGUOUS, None, wire=wire))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "ring"}, "algorithm is 'ring', allowed: exscan"),
        ({"chain": ((0, 0), (0, 0))}, "every slot of every rank exactly once"),
        ({"chain": ((0, 0), (0, 2))}, "every slot of every rank exactly once"),
        ({"chain": ((0, 0), (1, 0))}, "chain has 2 ranks, group 1"),
        ({"algorithm": "two_level"}, "two_level needs"),
    ],
)
def test_settings_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HandOff(**{"chain": CONTIGUOUS, "group": None, **arguments})


def nodes_that_are_no_neighbours() -> None:
    nodes = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    crosses = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    chain = ContextShard(0, 4).chain
    HandOff(chain, dist.group.WORLD, "two_level", None, nodes[rank % 2], crosses[rank // 2])


def test_nodes_have_to_be_neighbours() -> None:
    with pytest.raises(WorkerError, match="do not divide group"):
        run_workers(4, nodes_that_are_no_neighbours)
