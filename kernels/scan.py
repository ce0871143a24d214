"""The state entering each chunk: a scan over chunks, restarted at every segment.

A span of tokens acts on a state as S -> transition S + increment, whatever the recurrence: the transition is a decay
per key channel for GLA and a matrix for the delta rule. The same pair describes a rank's span to its neighbours.
"""

import torch
from torch import Tensor

from megatron_sse.kernels.segments import Edges, Pieces


def apply_transition(transition: Tensor, state: Tensor) -> Tensor:
    """transition [..., K, 1] (decay per channel) or [..., K, K] (matrix), state [..., K, V]."""
    return transition * state if transition.shape[-1] == 1 else transition @ state


class _Scan(torch.autograd.Function):
    """y[g + 1] = a[g] y[g] + u[g], but start[g + 1] where a segment starts; y[0] = start[0]."""

    @staticmethod
    def forward(ctx, a, u, start, first):
        y = torch.empty_like(u)
        y[0] = start[0]
        handed_on = torch.empty_like(u[0])
        for g in range(len(u) - 1):
            _step(a[g], y[g], u[g], out=handed_on)
            # Selected, not multiplied by zero: what is not finite stays in its segment.
            torch.where(first[g + 1], start[g + 1], handed_on, out=y[g + 1])
        ctx.save_for_backward(a, y, first)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        a, y, first = ctx.saved_tensors
        a_transposed = _transposed(a)
        zero = grad_y.new_zeros(())
        grad_y = grad_y.clone(memory_format=torch.contiguous_format)
        grad_u = torch.zeros_like(y)
        for g in range(len(y) - 2, -1, -1):
            torch.where(first[g + 1], zero, grad_y[g + 1], out=grad_u[g])
            _step(a_transposed[g], grad_u[g], grad_y[g], out=grad_y[g])
        grad_a = grad_u @ y.transpose(-1, -2) if a.shape[-1] > 1 else (grad_u * y).sum(-1, keepdim=True)
        grad_start = grad_y.masked_fill(~first, 0) if ctx.needs_input_grad[2] else None
        return grad_a, grad_u, grad_start, None


def _transposed(transition: Tensor) -> Tensor:
    return transition if transition.shape[-1] == 1 else transition.transpose(-1, -2)


def _step(a: Tensor, state: Tensor, increment: Tensor, out: Tensor) -> None:
    if a.shape[-1] == 1:
        torch.addcmul(increment, a, state, out=out)
    else:
        torch.baddbmm(increment, a, state, out=out)


def scan_states(
    transition_G: Tensor, increment_G: Tensor, pieces: Pieces, initial_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States at the chunks' entries and after each segment.

    Args:
        transition_G: [G, H, K, 1] or [G, H, K, K], what each chunk does to the state that enters it.
        increment_G: [G, H, K, V], what each chunk adds.
        pieces: the chunks.
        initial_S: [S, H, K, V], the state that enters each segment; None for zeros.

    Returns:
        entering [G, H, K, V] and final [S, H, K, V].
    """
    first = pieces.first_G.view(-1, 1, 1, 1)
    start = increment_G.new_zeros(()).expand_as(increment_G) if initial_S is None else initial_S[pieces.segment_G]
    entering = _Scan.apply(transition_G, increment_G, start, first)

    last = pieces.last_S
    final = apply_transition(transition_G[last], entering[last]) + increment_G[last]
    empty = pieces.empty_S.view(-1, 1, 1, 1)
    return entering, torch.where(empty, torch.zeros_like(final) if initial_S is None else initial_S, final)


def scan_spans(transition_G: Tensor, increment_G: Tensor, pieces: Pieces, edges: Edges) -> tuple[Tensor, Tensor]:
    """As scan_states, with the states that enter the spans from elsewhere.

    The scan runs once, from zero, with extra columns that start as the identity: they become what a segment does to the
    state that enters it. What enters is added when it has arrived.
    """
    key_dim, value_dim = increment_G.shape[-2:]
    columns = transition_G.shape[-1]
    identity = increment_G.new_ones(key_dim, 1) if columns == 1 else torch.eye(key_dim).to(increment_G)
    shape = (pieces.last_S.shape[0], *increment_G.shape[1:])
    zeros = increment_G.new_zeros(shape)
    start = torch.cat((zeros, identity.expand(*shape[:-1], columns)), dim=-1)
    padded = torch.nn.functional.pad(increment_G, (0, columns))
    entering, final = scan_states(transition_G, padded, pieces, start)
    (entering, before), (final, whole) = (x.split((value_dim, columns), dim=-1) for x in (entering, final))

    leaving = whole[edges.exit_FX] * edges.carries_FX[..., None, None, None]
    arriving = edges.exchange(leaving.flatten(1, 2), final[edges.exit_FX].flatten(1, 2))
    arriving = arriving.view(*edges.entry_FX.shape, *shape[1:]).masked_fill(
        ~edges.continues_FX[..., None, None, None], 0
    )
    initial = zeros.index_copy(0, edges.entry_FX.flatten(), arriving.flatten(0, 1))
    entering = entering + apply_transition(before, initial[pieces.segment_G])
    return entering, final + apply_transition(whole, initial)
