"""The hand-off as one differentiable function, which returns the state that enters each slot."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sse.parallel.handoff import algorithms
from megatron_sse.parallel.handoff.fold import transposed
from megatron_sse.parallel.handoff.settings import ALGORITHMS, HandOff

_FUNCTIONS = {
    "exscan": algorithms.exscan,
    "allgather": algorithms.allgather,
    "p2p": algorithms.serial,
    "two_level": algorithms.two_level,
}
if _FUNCTIONS.keys() != set(ALGORITHMS):
    raise ImportError(f"algorithms {sorted(ALGORITHMS)}, functions {sorted(_FUNCTIONS)}")


def exclusive_scan(transition: Tensor, state: Tensor, hand_off: HandOff) -> Tensor:
    """Return the state that enters each of this rank's slots, [F, U, K, V]; zeros enter the first slot of the chain.

    A slot acts on the state that enters it as S -> transition S + state; transition is 0 where a document starts in
    the slot. Every rank has to call this, and to run its backward, whatever its slots hold. The order of all sums is
    fixed, so repeated calls agree bitwise. Raises ValueError on shapes or dtypes that do not fit, or a wire dtype that
    is not allowed.

    Args:
        transition: [F, U, K, 1] (a decay per channel) or [F, U, K, K] (a matrix), fp32 or fp64, for the F slots of this
            rank and U independent units (sequences x states x heads).
        state: [F, U, K, V], what each slot adds; same dtype.
        hand_off: the chain, the ranks and the algorithm.
    """
    _check(transition, state, hand_off)
    return _ExclusiveScan.apply(transition, state, hand_off)


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


class _ExclusiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transition, state, hand_off):
        # Independent rows: the channels of all units (U * K) where the transition is a decay, otherwise the units.
        ctx.row_dims = (1, 2) if transition.shape[-1] == 1 else (1, 1)
        ctx.scan = _FUNCTIONS[hand_off.algorithm if hand_off.num_ranks > 1 else "p2p"]
        ctx.hand_off = hand_off
        rows = transition.flatten(*ctx.row_dims), state.flatten(*ctx.row_dims)
        entering, kept = ctx.scan(hand_off, *rows, None)
        entering = entering.view(state.shape)
        ctx.save_for_backward(entering, *kept)
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_entering):
        """Run the same scan along the reversed chain.

        With E the gradient of what enters: D[last] = 0 and D[c - 1] = transition[c]^T D[c] + E[c]. D[c] is the gradient
        of state[c], and D[c] entering[c]^T that of transition[c]; both are on the rank of slot c.
        """
        entering, *kept = ctx.saved_tensors
        kept = tuple(transposed(transition) for transition in kept)
        grad_state, _ = ctx.scan(ctx.hand_off, None, grad_entering.flatten(*ctx.row_dims), kept)
        grad_state = grad_state.view(entering.shape)
        grad_transition = None
        if ctx.needs_input_grad[0]:
            diagonal = ctx.row_dims == (1, 2)
            grad_transition = (grad_state * entering).sum(-1, keepdim=True) if diagonal else grad_state @ entering.mT
        return grad_transition, grad_state, None
