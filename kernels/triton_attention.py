"""SSE attention with Triton kernels: a recurrence's operators on pieces, and between them the scan over pieces."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sse.kernels.banks import BankInputs, BankOutputs, Picks, by_document, by_segment
from megatron_sse.kernels.routing import join_segments
from megatron_sse.kernels.scan import scan_pieces, scan_spans
from megatron_sse.kernels.segments import Segments
from megatron_sse.kernels.triton import gdn, gla
from megatron_sse.kernels.triton.rows import choose_chunks_per_piece, make_rows


class Operators(NamedTuple):
    """A recurrence's functions over rows, piece by piece.

    prepare: takes the inputs and T, returns the arguments that all others take first.
    summarize: returns what each piece does to the state that enters it: transition and increment.
    attend: returns the outputs [R, HV, V], given the entering states.
    summarize_backward: returns the gradients of the entering states through the pieces' own outputs.
    attend_backward: returns the gradients of q, k, g, (beta,) v, write and read by row, given the entering states and
        the full gradients of the leaving ones. These two determine the transition's gradient, which is never made.
    """

    prepare: Callable
    summarize: Callable
    attend: Callable
    summarize_backward: Callable
    attend_backward: Callable


def _gla_arguments(inputs: list[Tensor], num_tokens: int) -> tuple:
    return *inputs, num_tokens


def _gdn_arguments(inputs: list[Tensor], num_tokens: int) -> tuple:
    return inputs, num_tokens, gdn.gdn_prepare(inputs, num_tokens)


# By recurrence: those that kernels.registry says to have Triton kernels.
OPERATORS = {
    "gla": Operators(
        _gla_arguments, gla.gla_summarize, gla.gla_attend, gla.gla_summarize_backward, gla.gla_attend_backward
    ),
    "gdn": Operators(
        _gdn_arguments, gdn.gdn_summarize, gdn.gdn_attend, gdn.gdn_summarize_backward, gdn.gdn_attend_backward
    ),
}


def attend_banks(
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    picks: Picks | None,
    documents: Segments,
    document_T: Tensor,
    initial_DAHKV: Tensor | None,
) -> BankOutputs:
    """Compute kernels.sse.sse_attention; for the delta rule, q and k have to be normalised already.

    picks: all partitions where the form is mask.
    """
    num_tokens, num_heads = v_THV.shape[:2]
    segments, num_picks = documents, 0
    # The shared bank's rows write and read with factor 1, the picks' rows with their own.
    scales = [v_THV.new_ones(num_tokens, dtype=torch.float32)] * 3
    if picks is not None:
        num_picks = picks.bank_TP.shape[1]
        segments = join_segments(picks.bank_TP, document_T, documents, picks.num_partitions)
        of_picks = (picks.writes, picks.write_scale, picks.read_scale)
        scales = [torch.cat((ones, x.flatten())) for ones, x in zip(scales, of_picks, strict=True)]
    # About as many programs as share a piece: one for each head and 64 value channels.
    programs_per_piece = num_heads * -(-v_THV.shape[-1] // 64)
    chunks_per_piece = choose_chunks_per_piece(num_tokens * (1 + num_picks), programs_per_piece)
    rows = make_rows(segments, num_tokens, num_picks, chunks_per_piece)

    initial = None if initial_DAHKV is None else by_segment(initial_DAHKV)
    operators = OPERATORS[shared.recurrence.name]
    # Products take queries and keys in the values' dtype, so they are cast before the kernels read them.
    shared, sparse = (bank.cast(v_THV.dtype) for bank in (shared, sparse or shared))
    banks = (*shared.tensors, *sparse.tensors)
    o_RHV, final = _Recurrence.apply(operators, rows, segments.edges, initial, *banks, v_THV, *scales)
    picked_TPHV = o_RHV[num_tokens:].unflatten(0, (num_tokens, num_picks)) if num_picks else None
    return BankOutputs(o_RHV[:num_tokens], picked_TPHV, by_document(final, documents.num_segments))


class _Recurrence(torch.autograd.Function):
    """The recurrence: outputs by row and final states by segment."""

    @staticmethod
    def forward(ctx, operators, rows, edges, initial_SHKV, *tensors):
        inputs = [*(x.contiguous() for x in tensors), *rows.tables]
        arguments = operators.prepare(inputs, rows.num_tokens)
        transition, increment = operators.summarize(*arguments)
        ctx.handed_on = None
        if edges is None:
            entering, final = scan_pieces(transition, increment, initial_SHKV, rows.pieces, reverse=False)
        else:
            # The exchange with other ranks is differentiable itself: its graph is kept, and run in backward.
            with torch.enable_grad():
                graph = scan_spans(transition, increment.requires_grad_(), rows.pieces, edges)
            ctx.handed_on = increment, graph
            entering, final = (x.detach() for x in graph)
        ctx.save_for_backward(transition, entering, *inputs)
        ctx.operators, ctx.rows, ctx.has_initial = operators, rows, initial_SHKV is not None
        return operators.attend(*arguments, entering), final

    @staticmethod
    def backward(ctx, grad_o_RHV, grad_final):
        operators, num_tokens = ctx.operators, ctx.rows.num_tokens
        transition, entering, *inputs = ctx.saved_tensors
        # Computed again rather than kept: it is as large as the queries.
        arguments = operators.prepare(inputs, num_tokens)
        grad_o_RHV = grad_o_RHV.contiguous()
        grad_entering = operators.summarize_backward(*arguments, grad_o_RHV)
        if ctx.handed_on is None:
            pieces = ctx.rows.pieces
            grad_leaving, grad_initial = scan_pieces(transition, grad_entering, grad_final, pieces, reverse=True)
        else:
            increment, graph = ctx.handed_on
            (grad_leaving,), grad_initial = torch.autograd.grad(graph, increment, (grad_entering, grad_final)), None
        *grads, grad_write, grad_read = operators.attend_backward(*arguments, entering, grad_o_RHV, grad_leaving)
        shared, sparse = zip(*(_by_token(grad, num_tokens) for grad in grads), strict=True)
        # All banks see the same values, so the gradients of both kinds of rows add up.
        grad_v = shared[-1] if sparse[-1] is None else shared[-1] + sparse[-1]
        banks = (*shared[:-1], *sparse[:-1])
        return None, None, None, grad_initial if ctx.has_initial else None, *banks, grad_v, None, grad_write, grad_read


def _by_token(grad_R: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return gradients by token: from the shared bank's rows, and from the picks' rows, summed over the picks."""
    if grad_R.shape[0] == num_tokens:
        return grad_R, None
    return grad_R[:num_tokens], grad_R[num_tokens:].unflatten(0, (num_tokens, -1)).sum(1)
