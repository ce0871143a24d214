"""The hand-off as a differentiable function in two parts, so that other work can be done while states travel.

The first part starts the exchange, the second waits for it. Backward goes through them in the opposite order: the
second part starts exchanging the gradients, the first one waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sse.parallel.handoff import algorithms
from megatron_sse.parallel.handoff.fold import transposed
from megatron_sse.parallel.handoff.settings import ALGORITHMS, HandOff
from megatron_sse.parallel.handoff.wire import start

_FUNCTIONS: dict[str, Callable[..., algorithms.Scan]] = {
    "exscan": algorithms.exscan,
    "allgather": algorithms.allgather,
    "p2p": algorithms.serial,
    "two_level": algorithms.two_level,
}
if _FUNCTIONS.keys() != set(ALGORITHMS):
    raise ImportError(f"algorithms {sorted(ALGORITHMS)}, functions {sorted(_FUNCTIONS)}")


def begin_exclusive_scan(
    transition: Tensor, state: Tensor, hand_off: HandOff
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Start to compute the state that enters each of this rank's slots; zeros enter the first slot of the chain.

    A slot acts on the state that enters it as S -> transition S + state; transition is 0 where a document starts in
    the slot. Every rank has to call this, and to run its backward, whatever its slots hold. The order of all sums is
    fixed, so repeated calls agree bitwise. Raises ValueError on shapes or dtypes that do not fit, or a wire dtype that
    is not allowed.

    Args:
        transition: [F, U, K, 1] (a decay per channel) or [F, U, K, K] (a matrix), fp32 or fp64, for the F slots of this
            rank and U independent units (sequences x states x heads).
        state: [F, U, K, V], what each slot adds; same dtype.
        hand_off: the chain, the ranks and the algorithm.

    Returns:
        begun: an empty tensor, which ties the two parts together in autograd's graph.
        finish: finish(begun) waits, and returns the entering states [F, U, K, V]. Its backward starts to exchange
            their gradients, and begun's backward waits for these.
    """
    _check(transition, state, hand_off)
    # Independent rows: the channels of all units (U * K) where the transition is a decay, otherwise the units.
    row_dims = (1, 2) if transition.shape[-1] == 1 else (1, 1)
    scan = _FUNCTIONS[hand_off.algorithm if hand_off.num_ranks > 1 else "p2p"]
    under_way = _UnderWay(hand_off, scan, row_dims)
    return _Begin.apply(transition, state, under_way), lambda begun: _Finish.apply(begun, state.shape, under_way)


@dataclass
class _UnderWay:
    """The state that the two parts share, besides `begun` and its gradient.

    finish: waits for what is under way, states or their gradients, and returns it with the transitions to keep.
    entering: for the gradient of the transitions.
    """

    hand_off: HandOff
    scan: Callable[..., algorithms.Scan]
    row_dims: tuple[int, int]
    finish: Callable[[], tuple[Tensor, algorithms.Kept]] | None = field(default=None, init=False)
    entering: Tensor | None = field(default=None, init=False)

    def start(self, transition: Tensor | None, state: Tensor, kept: algorithms.Kept | None) -> None:
        rows = None if transition is None else transition.flatten(*self.row_dims), state.flatten(*self.row_dims)
        self.finish = start(self.scan(self.hand_off, *rows, kept))

    def wait(self) -> tuple[Tensor, algorithms.Kept]:
        assert self.finish is not None
        # Set back at once, since it holds what was sent.
        finish, self.finish = self.finish, None
        return finish()


def _check(transition: Tensor, state: Tensor, hand_off: HandOff) -> None:
    key_dim = state.shape[-2]
    shapes = f"transition {list(transition.shape)}, state {list(state.shape)}"
    if state.dim() != 4 or transition.shape[:3] != state.shape[:3] or transition.shape[3:] not in ((1,), (key_dim,)):
        raise ValueError(f"transition must be [F, U, K, 1 or K] and state [F, U, K, V], got {shapes}")
    if state.shape[0] != hand_off.num_slots:
        raise ValueError(f"chain has {hand_off.num_slots} slots on each rank, got {shapes}")
    if transition.dtype != state.dtype or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"transition and state must be fp32 or fp64, got {transition.dtype} and {state.dtype}")
    if hand_off.wire in (None, state.dtype):
        return
    if hand_off.wire != torch.bfloat16:
        raise ValueError(f"wire is {hand_off.wire}, allowed: {state.dtype} (the states'), torch.bfloat16")


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transition, state, under_way):
        under_way.start(transition, state, None)
        ctx.under_way = under_way
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_begun):
        """Return D[c], the gradient of state[c], and D[c] entering[c]^T, that of transition[c] (see _Finish)."""
        under_way, grad_transition = ctx.under_way, None
        grad_state, _ = under_way.wait()
        entering, under_way.entering = under_way.entering, None
        grad_state = grad_state.view(entering.shape)
        if ctx.needs_input_grad[0]:
            diagonal = under_way.row_dims == (1, 2)
            grad_transition = (grad_state * entering).sum(-1, keepdim=True) if diagonal else grad_state @ entering.mT
        return grad_transition, grad_state, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun, shape, under_way):
        entering, kept = under_way.wait()
        entering = entering.view(shape)
        ctx.save_for_backward(entering, *kept)
        ctx.under_way = under_way
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_entering):
        """Start the same scan along the reversed chain.

        With E the gradient of what enters: D[last] = 0 and D[c - 1] = transition[c]^T D[c] + E[c]; D[c] is on the rank
        of slot c.
        """
        under_way = ctx.under_way
        under_way.entering, *kept = ctx.saved_tensors
        under_way.start(None, grad_entering, tuple(transposed(transition) for transition in kept))
        return grad_entering.new_empty(0), None, None
