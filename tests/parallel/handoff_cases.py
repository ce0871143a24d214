"""Chains of slots with known answers, in one process and spread over ranks."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.kernels.scan import apply_transition
from megatron_sse.parallel.handoff import HandOff, begin_exclusive_scan, scan
from megatron_sse.parallel.sharding import Chain, ContextShard
from tests.workers import run_workers


@dataclass(frozen=True)
class Case:
    """Sizes and settings of a hand-off; the odd sizes (3 units, 15 channels) do not divide by 2 or 4."""

    size: int = 2
    zigzag: bool = False
    matrix: bool = False
    algorithm: str = "exscan"
    resets: str = "none"
    node_size: int = 2
    units: int = 3
    key_dim: int = 5
    value_dim: int = 4
    dtype: torch.dtype = torch.float64
    wire: torch.dtype | None = None
    seed: int = 0

    @property
    def chain(self) -> Chain:
        return ContextShard(0, self.size, self.zigzag).chain

    def __str__(self) -> str:
        names = [self.algorithm, "matrix" if self.matrix else "diagonal", "zigzag" if self.zigzag else "contiguous"]
        return "-".join([*names, str(self.size), self.resets])


@dataclass
class Slots:
    """Tensors of slots, in chain order or of one rank; `weight` is the loss's gradient for the entering states."""

    transition: Tensor
    state: Tensor
    weight: Tensor


def whole_chain(case: Case) -> Slots:
    """Return a chain with transitions near 1, so that entering states are a large part of leaving ones."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (len(case.chain), case.units, case.key_dim)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    if case.matrix:
        transition = torch.eye(case.key_dim, dtype=torch.float64).expand(*shape, -1)
        for _ in range(4):
            key = torch.nn.functional.normalize(normal(*shape, 1), dim=-2)
            step = torch.rand(*shape[:2], 1, 1, generator=generator, dtype=torch.float64) * 0.5
            transition = 0.98 * (transition - step * key @ (key.mT @ transition))
    else:
        decays = torch.tensor([0, 0.1, 1], dtype=torch.float64)
        transition = decays[torch.randint(3, shape, generator=generator)].neg().exp().unsqueeze(-1)
    keep = torch.rand(*shape[:2], generator=generator) < {"none": 1.0, "some": 0.6, "all": 0.0}[case.resets]
    transition = transition * keep[..., None, None]
    state, weight = normal(*shape, case.value_dim), normal(*shape, case.value_dim)
    return Slots(*(x.to(case.dtype) for x in (transition, state, weight)))


def serial_fold(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Return entering states and gradients of transitions and states, by torch's autograd in one process."""
    transition, state = (x.clone().requires_grad_() for x in (slots.transition, slots.state))
    # Zeros that are connected to the graph.
    entering = [state[0] * 0]
    for here in range(len(state) - 1):
        entering.append(apply_transition(transition[here], entering[here]) + state[here])
    result = torch.stack(entering)
    gradients = torch.autograd.grad((result * slots.weight).sum(), (transition, state), materialize_grads=True)
    return result.detach(), *gradients


def own_slots(case: Case, rank: int) -> Slots:
    whole = whole_chain(case)
    places = [case.chain.index((rank, slot)) for slot in range(2 if case.zigzag else 1)]
    own = Slots(*(x[places].clone() for x in (whole.transition, whole.state, whole.weight)))
    own.transition.requires_grad_()
    own.state.requires_grad_()
    return own


def make_hand_off(case: Case, chain: Chain | None = None) -> HandOff:
    """Return a hand-off over all processes of this world."""
    chain = chain or case.chain
    if case.algorithm != "two_level":
        return HandOff(chain, dist.group.WORLD, case.algorithm, case.wire)
    return HandOff(chain, dist.group.WORLD, case.algorithm, case.wire, *_node_groups(case.node_size))


def _node_groups(node_size: int) -> tuple[Any, Any]:
    size, rank = dist.get_world_size(), dist.get_rank()
    nodes = [dist.new_group(list(range(first, first + node_size))) for first in range(0, size, node_size)]
    crosses = [dist.new_group(list(range(place, size, node_size))) for place in range(node_size)]
    return nodes[rank // node_size], crosses[rank % node_size]


def exclusive_scan(transition: Tensor, state: Tensor, hand_off: HandOff) -> Tensor:
    """Return the entering states, with nothing done while they travel."""
    begun, finish = begin_exclusive_scan(transition, state, hand_off)
    return finish(begun)


def scan_own_slots(case: Case, bug: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's entering states and gradients of transitions and states. bug: the fault to inject."""
    own = own_slots(case, dist.get_rank())
    hand_off = make_hand_off(case, tuple(sorted(case.chain)) if bug == "rank order" else None)
    broken: dict[str, Any] = {}
    if bug == "not transposed":
        broken = {"transposed": lambda transition: transition}
    if bug == "skipped":
        broken = {"_FUNCTIONS": dict.fromkeys(scan._FUNCTIONS, _skip)}
    with mock.patch.multiple(scan, **broken) if broken else mock.MagicMock():
        entering = exclusive_scan(own.transition, own.state, hand_off)
        (entering * own.weight).sum().backward()
    assert own.transition.grad is not None and own.state.grad is not None
    return entering.detach(), own.transition.grad, own.state.grad


def _skip(hand_off: HandOff, transition: Tensor | None, state: Tensor, kept: Any) -> Any:
    yield from ()
    return torch.zeros_like(state), kept or (transition,)


def scan_over_ranks(case: Case, bug: str | None = None) -> list[Tensor]:
    """Return the results of scan_own_slots on all ranks, in chain order."""
    return in_chain_order(case, run_workers(case.size, scan_own_slots, case, bug))


def in_chain_order(case: Case, by_rank: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.stack([x[rank][slot] for rank, slot in case.chain]) for x in zip(*by_rank, strict=True)]


def worst_error(results: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(results, expected, strict=True))
