"""The state entering each chunk: a scan over chunks, restarted at every segment.

A span of tokens acts on a state as S -> transition S + increment, whatever the recurrence: the transition is a decay
per key channel for GLA and a matrix for the delta rule. The same pair describes a rank's span to its neighbours.
"""

import torch
from torch import Tensor

from megatron_sse.kernels.segments import ChunkGrid, Edges


def apply_transition(transition: Tensor, state: Tensor) -> Tensor:
    """transition [..., K, 1] (decay per channel) or [..., K, K] (matrix), state [..., K, V]."""
    return transition * state if transition.shape[-1] == 1 else transition @ state


class _LinearScan(torch.autograd.Function):
    """y[g] = a[g] y[g - 1] + u[g], with y[-1] = 0."""

    @staticmethod
    def forward(ctx, a, u):
        y = torch.empty_like(u)
        y[0] = u[0]
        for g in range(1, u.shape[0]):
            _step(a[g], y[g - 1], u[g], out=y[g])
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        a, y = ctx.saved_tensors
        grad_u = torch.empty_like(grad_y)
        grad_u[-1] = grad_y[-1]
        a_transposed = _transposed(a)
        for g in range(grad_y.shape[0] - 2, -1, -1):
            _step(a_transposed[g + 1], grad_u[g + 1], grad_y[g], out=grad_u[g])
        grad_a = torch.zeros_like(a)
        if a.shape[-1] > 1:
            torch.matmul(grad_u[1:], y[:-1].transpose(-1, -2), out=grad_a[1:])
        else:
            torch.sum(grad_u[1:] * y[:-1], dim=-1, keepdim=True, out=grad_a[1:])
        return grad_a, grad_u


def _transposed(transition: Tensor) -> Tensor:
    return transition if transition.shape[-1] == 1 else transition.transpose(-1, -2)


def _step(a: Tensor, state: Tensor, increment: Tensor, out: Tensor) -> None:
    if a.shape[-1] == 1:
        torch.addcmul(increment, a, state, out=out)
    else:
        torch.baddbmm(increment, a, state, out=out)


def scan_states(
    transition_G: Tensor, increment_G: Tensor, grid: ChunkGrid, initial_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States at the chunks' entries and after each segment.

    Args:
        transition_G: [G, H, K, 1] or [G, H, K, K], what each chunk does to the state that enters it.
        increment_G: [G, H, K, V], what each chunk adds.
        grid: the chunks.
        initial_S: [S, H, K, V], the state that enters each segment; None for zeros.

    Returns:
        entering [G, H, K, V] and final [S, H, K, V].
    """
    first = grid.first_G.view(-1, 1, 1, 1)
    # Shifted by one: what the previous chunk hands on, cut where a segment starts.
    a = torch.nn.functional.pad(transition_G[:-1], (0, 0, 0, 0, 0, 0, 1, 0)).masked_fill(first, 0)
    u = torch.nn.functional.pad(increment_G[:-1], (0, 0, 0, 0, 0, 0, 1, 0)).masked_fill(first, 0)
    if initial_S is not None:
        u = u + initial_S[grid.segment_G].masked_fill(~first, 0)
    entering = _LinearScan.apply(a, u)

    last = grid.last_S
    final = apply_transition(transition_G[last], entering[last]) + increment_G[last]
    empty = grid.empty_S.view(-1, 1, 1, 1)
    return entering, torch.where(empty, torch.zeros_like(final) if initial_S is None else initial_S, final)


def scan_spans(transition_G: Tensor, increment_G: Tensor, grid: ChunkGrid, edges: Edges) -> tuple[Tensor, Tensor]:
    """As scan_states, with the states that enter the spans from elsewhere.

    The scan runs once, from zero, with extra columns that start as the identity: they become what a segment does to the
    state that enters it. What enters is added when it has arrived.
    """
    key_dim, value_dim = increment_G.shape[-2:]
    columns = transition_G.shape[-1]
    identity = increment_G.new_ones(key_dim, 1) if columns == 1 else torch.eye(key_dim).to(increment_G)
    shape = (grid.last_S.shape[0], *increment_G.shape[1:])
    zeros = increment_G.new_zeros(shape)
    start = torch.cat((zeros, identity.expand(*shape[:-1], columns)), dim=-1)
    padded = torch.nn.functional.pad(increment_G, (0, columns))
    entering, final = scan_states(transition_G, padded, grid, start)
    (entering, before), (final, whole) = (x.split((value_dim, columns), dim=-1) for x in (entering, final))

    leaving = whole[edges.exit_FX] * edges.carries_FX[..., None, None, None]
    arriving = edges.exchange(leaving.flatten(1, 2), final[edges.exit_FX].flatten(1, 2))
    arriving = arriving.view(*edges.entry_FX.shape, *shape[1:]).masked_fill(
        ~edges.continues_FX[..., None, None, None], 0
    )
    initial = zeros.index_copy(0, edges.entry_FX.flatten(), arriving.flatten(0, 1))
    entering = entering + apply_transition(before, initial[grid.segment_G])
    return entering, final + apply_transition(whole, initial)
