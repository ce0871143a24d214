"""The state entering each chunk: a scan over chunks, restarted at every segment.

A span of tokens acts on a state as S -> transition S + increment, whatever the recurrence: the transition is a decay
per key channel for GLA and a matrix for the delta rule. The same pair describes a rank's span to its neighbours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_sse.kernels.backend import use_triton
from megatron_sse.kernels.segments import Edges, Pieces


def apply_transition(transition: Tensor, state: Tensor) -> Tensor:
    """Return transition S; transition [..., K, 1] (a decay per channel) or [..., K, K] (a matrix), S [..., K, V]."""
    return transition * state if transition.shape[-1] == 1 else transition @ state


class _Scan(torch.autograd.Function):
    """y[m + 1] = a[m] y[m] + u[m], but the segment's initial state where one starts; and what leaves each segment.

    Where a document starts in piece m, a[m] is zero: y[m + 1] = u[m], whatever y[m] is.
    """

    @staticmethod
    def forward(ctx, a, u, initial_S, pieces):
        y, final_S = scan_pieces(a, u, initial_S, pieces, reverse=False)
        ctx.save_for_backward(a, y)
        ctx.pieces = pieces
        return y, final_S

    @staticmethod
    def backward(ctx, grad_y, grad_final_S):
        a, y = ctx.saved_tensors
        # The same recurrence, from the segments' ends to their starts.
        grad_u, grad_initial_S = scan_pieces(a, grad_y, grad_final_S, ctx.pieces, reverse=True)
        grad_a = None
        if ctx.needs_input_grad[0]:
            grad_a = grad_u @ y.transpose(-1, -2) if a.shape[-1] > 1 else (grad_u * y).sum(-1, keepdim=True)
            if ctx.pieces.resets is not None:
                grad_a = _empty(grad_a, ctx.pieces.resets.inside_M)
        return grad_a, grad_u, grad_initial_S if ctx.needs_input_grad[2] else None, None


def scan_pieces(
    transition_M: Tensor, increment_M: Tensor, initial_S: Tensor | None, pieces: Pieces, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the pieces and those that leave the segments, without gradients.

    Args:
        reverse: the transposed transitions, from the last piece of each segment to the first: given the gradients of
            what the forward scan returns, those of the increments and of the initial states.
    """
    if use_triton(increment_M):
        from megatron_sse.kernels.triton.scan import run_scan

        return run_scan(transition_M, increment_M, initial_S, pieces, reverse)
    return _run_torch(transition_M, increment_M, initial_S, pieces, reverse)


def _run_torch(a: Tensor, u: Tensor, initial_S: Tensor | None, pieces: Pieces, reverse: bool) -> tuple[Tensor, Tensor]:
    a = _transposed(a) if reverse else a
    state_S = u.new_zeros(len(pieces.first_S), *u.shape[1:]) if initial_S is None else initial_S.clone()
    y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    waves = _waves(pieces)
    for m in reversed(waves) if reverse else waves:
        segment = pieces.segment_M[m]
        # Pieces of a wave belong to different segments, so no two of them write the same state.
        y[m] = state_S[segment]
        kept = apply_transition(a[m], y[m])
        if pieces.resets is not None:
            # Selected, since y may be inf or nan, and zero times that would be nan.
            kept.masked_fill_(pieces.resets.inside_M[m][:, None, None, None], 0)
        state_S[segment] = kept + u[m]
    return y, state_S


def _empty(state: Tensor, where: Tensor) -> Tensor:
    """Return states [..., H, K, V] with zeros `where` (bool [...])."""
    return state.masked_fill(where[..., None, None, None], 0)


def _waves(pieces: Pieces) -> Sequence[Tensor | slice]:
    """Return which pieces are computed at once, in order: the first ones of all segments, the second ones, ..."""
    if pieces.start_M.device.type != "cpu":
        # One by one: their number in each wave is not known on the host. What is not used changes nothing.
        return [slice(m, m + 1) for m in range(len(pieces.start_M))]
    used = np.flatnonzero(pieces.end_M.numpy() > pieces.start_M.numpy())
    step = pieces.step_M.numpy()[used]
    order = torch.from_numpy(used[step.argsort(kind="stable")])
    return order.split(np.bincount(step).tolist())


def _transposed(transition: Tensor) -> Tensor:
    return transition if transition.shape[-1] == 1 else transition.transpose(-1, -2)


def scan_states(
    transition_M: Tensor, increment_M: Tensor, pieces: Pieces, initial_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the chunks and those after each segment.

    Args:
        transition_M: [M, H, K, 1] or [M, H, K, K], what each chunk does to the state that enters it.
        increment_M: [M, H, K, V], what each chunk adds.
        pieces: the chunks.
        initial_S: [S, H, K, V], the state that enters each segment; None for zeros.

    Returns:
        entering [M, H, K, V] and final [S, H, K, V], after the segments' last rows (see PieceResets.settle).
    """
    return _Scan.apply(transition_M, increment_M, initial_S, pieces)


class UnderWay(NamedTuple):
    """A scan of spans that have handed on their states, and wait for those that enter them.

    begun, finish: of the exchange (see Edges).
    entering, final: what scan_states returns where zeros enter the spans.
    before, whole: the product of a segment's transitions before each piece, and of all its pieces.
    """

    begun: Tensor
    finish: Callable[[Tensor], Tensor]
    entering: Tensor
    final: Tensor
    before: Tensor
    whole: Tensor


def begin_spans(transition_M: Tensor, increment_M: Tensor, pieces: Pieces, edges: Edges) -> UnderWay:
    """Start what scan_states does, with states that enter the spans from other ranks.

    The scan runs once, from zero, with extra columns that start as the identity: they become what a segment does to the
    state that enters it. What enters is added when it has arrived (finish_spans).
    """
    key_dim, value_dim = increment_M.shape[-2:]
    columns = transition_M.shape[-1]
    # What a segment of no rows does: a decay of 1 in every channel, or the identity matrix.
    identity = increment_M.new_ones(key_dim, 1)
    if columns > 1:
        identity = torch.eye(key_dim, dtype=increment_M.dtype, device=increment_M.device)
    shape = (pieces.last_S.shape[0], *increment_M.shape[1:])
    start = torch.cat((increment_M.new_zeros(shape), identity.expand(*shape[:-1], columns)), dim=-1)
    padded = torch.nn.functional.pad(increment_M, (0, columns))
    entering, final = scan_states(transition_M, padded, pieces, start)
    (entering, before), (final, whole) = (x.split((value_dim, columns), dim=-1) for x in (entering, final))
    if not transition_M.requires_grad:
        # These columns depend on the transitions alone.
        before, whole = before.detach(), whole.detach()

    # A span in which a document starts passes on nothing of what entered it: its transition is zero.
    leaving = _empty(whole[edges.span_FU], ~edges.carries_FU)
    settled = final if pieces.resets is None else pieces.resets.settle(final)
    begun, finish = edges.exchange(leaving.flatten(1, 2), settled[edges.span_FU].flatten(1, 2))
    return UnderWay(begun, finish, entering, final, before, whole)


def finish_spans(under_way: UnderWay, pieces: Pieces, edges: Edges) -> tuple[Tensor, Tensor]:
    """Wait for the states that enter the spans, and return what scan_states does."""
    _, _, entering, final, before, whole = under_way
    arriving = under_way.finish(under_way.begun)
    arriving = _empty(arriving.view(*edges.span_FU.shape, *final.shape[1:]), ~edges.continues_FU)
    # Every segment is of one span and bank, so that each gets a state.
    initial = torch.zeros_like(final).index_copy(0, edges.span_FU.flatten(), arriving.flatten(0, 1))
    # Linear in what enters: the state that enters a piece is the local one plus the product of the pieces before it.
    if pieces.resets is None:
        return entering + apply_transition(before, initial[pieces.segment_M]), final + apply_transition(whole, initial)
    started_M, started_S = pieces.resets.before_M, pieces.resets.inside_S
    # The transitions behind a reset are zero already. They are selected as well, for the sake of their gradients.
    passed_M = apply_transition(_empty(before, started_M), initial[pieces.segment_M])
    passed_S = apply_transition(_empty(whole, started_S), initial)
    return entering + _empty(passed_M, started_M), final + _empty(passed_S, started_S)
