"""The common part of all recurrences: inside a chunk all is matrix products, between chunks a scan.

A chunk acts on the state S that enters it: it outputs within + query S and leaves the state transition S + increment.
Both are affine in S, so a recurrence is defined by these four tensors and their function of the chunk's rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sse.chunking import CPU_BLOCK, GPU_BLOCK, choose_chunk_size
from megatron_sse.kernels.scan import begin_spans, finish_spans, scan_states
from megatron_sse.kernels.segments import Segments, from_chunks, make_grid, to_chunks


class ChunkAction(NamedTuple):
    """For each of G chunks (times heads): within [G, C, V], query [G, C, K], transition [G, K, 1] (a decay per channel)
    or [G, K, K], increment [G, K, V]."""

    within: Tensor
    query: Tensor
    transition: Tensor
    increment: Tensor


def run_chunks(
    act: Callable[..., ChunkAction],
    rows: tuple[Tensor, ...],
    segments: Segments,
    initial_SHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output [R, H, V] and final states [S, H, K, V] of the recurrence whose chunks act as `act(*rows)` says.

    Args:
        act: from chunks [G, C, c] of each of `rows` to what they do.
        rows: [R, H, c] each, all fp32 or all fp64. Where the segments have resets, log decays are -inf at these.
        segments, initial_SHKV: as in the recurrences.
    """
    num_rows, num_heads = rows[0].shape[:2]
    grid = make_grid(segments, num_rows, num_heads, choose_chunk_size(num_rows, segments.num_segments))
    # Heads are folded into the chunks here: every product below is a batch of small matrices.
    within, query, transition, increment = _InBlocks.apply(act, *(to_chunks(x, grid) for x in rows))
    transition, increment = (x.unflatten(0, (-1, grid.num_heads)) for x in (transition, increment))
    if segments.edges is None:
        entering, final_SHKV = scan_states(transition, increment, grid.chunks, initial_SHKV)
    else:
        assert initial_SHKV is None
        under_way = begin_spans(transition, increment, grid.chunks, segments.edges)
        entering, final_SHKV = finish_spans(under_way, grid.chunks, segments.edges)
    entering = entering.flatten(0, 1)
    if segments.resets is None:
        return from_chunks(torch.baddbmm(within, query, entering), grid), final_SHKV
    assert grid.chunks.resets is not None
    start_G1 = grid.chunks.start_M[:, None]
    position_GC = start_G1 + torch.arange(grid.chunks.size, device=start_G1.device)
    behind_GC = segments.resets.inside(start_G1, position_GC + 1)
    behind = behind_GC.repeat_interleave(num_heads, 0)[..., None]
    o = _ReadBeforeResets.apply(within, query, entering, behind)
    return from_chunks(o, grid), grid.chunks.resets.settle(final_SHKV)


class _ReadBeforeResets(torch.autograd.Function):
    """within + query entering, without the product for rows behind a reset.

    Their queries are zero, but what enters may be inf or nan, and its product with zero would be nan. Where it is, the
    rows in front of the reset become nan, and no query of the chunk gets a gradient.
    """

    @staticmethod
    def forward(ctx, within, query, entering, behind):
        ctx.save_for_backward(query, entering, behind)
        return torch.bmm(query, entering).masked_fill_(behind, 0).add_(within)

    @staticmethod
    def backward(ctx, grad):
        query, entering, behind = ctx.saved_tensors
        grad_read = grad.masked_fill(behind, 0)
        grad_query = torch.bmm(grad_read, entering.transpose(-1, -2))
        # Gradients of one row's query reach the others' keys, times zero.
        low, high = entering.amin((-1, -2), keepdim=True), entering.amax((-1, -2), keepdim=True)
        grad_query.masked_fill_(behind | ~(low.isfinite() & high.isfinite()), 0)
        return grad, grad_query, torch.bmm(query.transpose(-1, -2), grad_read), None


class _InBlocks(torch.autograd.Function):
    """A function of chunks, applied to blocks of them and computed again in backward: only its inputs are kept."""

    @staticmethod
    def forward(ctx, act, *chunks):
        ctx.act = act
        ctx.save_for_backward(*chunks)
        size = _block_size(chunks[0])
        if len(chunks[0]) <= size:
            return tuple(act(*chunks))
        blocks = zip(*(x.split(size) for x in chunks), strict=True)
        return tuple(torch.cat(x) for x in zip(*(act(*block) for block in blocks), strict=True))

    @staticmethod
    def backward(ctx, *grad_outputs):
        chunks = ctx.saved_tensors
        size = _block_size(chunks[0])
        grad_inputs = [torch.empty_like(x) for x in chunks]
        for start in range(0, chunks[0].shape[0], size):
            block = slice(start, start + size)
            with torch.enable_grad():
                inputs = [x[block].detach().requires_grad_() for x in chunks]
                outputs = ctx.act(*inputs)
            grads = torch.autograd.grad(outputs, inputs, [grad[block] for grad in grad_outputs])
            for grad_input, grad in zip(grad_inputs, grads, strict=True):
                grad_input[block] = grad
        return None, *grad_inputs


def _block_size(chunks: Tensor) -> int:
    """Return the chunks per block."""
    return max(1, (CPU_BLOCK if chunks.device.type == "cpu" else GPU_BLOCK) // chunks[0].numel())


def join_lower(early: Tensor, below: Tensor, late: Tensor) -> Tensor:
    """Return the block matrix [[early, 0], [below, late]] of squares of one size."""
    zeros = torch.zeros_like(early)
    return torch.cat((torch.cat((early, zeros), dim=-1), torch.cat((below, late), dim=-1)), dim=-2)
