"""SSE attention with Triton kernels: a recurrence's operators on pieces, and between them the scan over pieces."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sse.chunking import choose_chunks_per_piece
from megatron_sse.kernels.banks import BankInputs, BankOutputs, Picks, by_segment, by_span
from megatron_sse.kernels.resets import Resets, find_bad_rows
from megatron_sse.kernels.routing import join_segments
from megatron_sse.kernels.scan import begin_spans, finish_spans, scan_pieces
from megatron_sse.kernels.segments import Segments, Spans
from megatron_sse.kernels.triton import gdn, gla
from megatron_sse.kernels.triton.rows import Rows, make_rows
from megatron_sse.recurrence import RECURRENCES


class Operators(NamedTuple):
    """A recurrence's functions over rows, piece by piece.

    prepare: takes the inputs and T, returns the arguments that all others take first.
    with_inputs: returns these arguments with other inputs, for `attend`.
    summarize: returns what each piece does to the state that enters it: transition and increment.
    meet: returns what else the outputs need besides the entering states, such as scores; not what `prepare` has made.
    attend: returns the outputs [R, HV, V], given what `meet` returns and the entering states.
    summarize_backward: returns the gradients of the entering states through the pieces' own outputs.
    again: returns what `attend_backward` needs of the forward pass, given the entering states.
    attend_backward: returns the gradients of q, k, g, (beta,) v, write and read by row, given what `again` returns and
        the full gradients of the leaving states. These two determine the transition's gradient, which is never made.

    So `meet` and `again` can run while states of other ranks, or their gradients, are on their way.
    """

    prepare: Callable
    with_inputs: Callable
    summarize: Callable
    meet: Callable
    attend: Callable
    summarize_backward: Callable
    again: Callable
    attend_backward: Callable


def _gla_arguments(inputs: list[Tensor], num_tokens: int) -> tuple:
    return *inputs, num_tokens


def _gla_attend(*arguments) -> Tensor:
    *inputs, met, entering = arguments
    return gla.gla_attend(*inputs, *met, entering)


def _gla_attend_backward(*arguments) -> tuple[Tensor, ...]:
    *inputs, again, grad_o, grad_leaving = arguments
    return gla.gla_attend_backward(*inputs, *again, grad_o, grad_leaving)


def _gdn_arguments(inputs: list[Tensor], num_tokens: int) -> tuple:
    return inputs, num_tokens, gdn.gdn_prepare(inputs, num_tokens)


# By recurrence: those with has_triton.
OPERATORS = {
    "gla": Operators(
        prepare=_gla_arguments,
        with_inputs=lambda arguments, inputs: (*inputs, arguments[-1]),
        summarize=gla.gla_summarize,
        meet=gla.gla_prepare,
        attend=_gla_attend,
        summarize_backward=gla.gla_summarize_backward,
        again=gla.gla_again,
        attend_backward=_gla_attend_backward,
    ),
    "gdn": Operators(
        prepare=_gdn_arguments,
        with_inputs=lambda arguments, inputs: (inputs, *arguments[1:]),
        summarize=gdn.gdn_summarize,
        # Scores are made beside the inverse, which `summarize` needs.
        meet=lambda *arguments: (),
        attend=lambda *arguments: gdn.gdn_attend(*arguments[:-2], arguments[-1]),
        summarize_backward=gdn.gdn_summarize_backward,
        again=gdn.gdn_again,
        attend_backward=gdn.gdn_attend_backward,
    ),
}
if OPERATORS.keys() != {name for name, row in RECURRENCES.items() if row.has_triton}:
    raise ImportError(f"operators of {sorted(OPERATORS)}, has_triton says otherwise")


def attend_banks(
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    picks: Picks | None,
    spans: Spans,
    initial_YAHKV: Tensor | None,
) -> BankOutputs:
    """Compute kernels.sse.sse_attention; for the delta rule, q and k have to be normalised already.

    picks: all partitions where the form is mask.
    """
    num_tokens, num_heads = v_THV.shape[:2]
    segments, num_picks = spans.segments() if picks is None else None, 0
    # The shared bank's rows write and read with factor 1, the picks' rows with their own.
    scales = [v_THV.new_ones(num_tokens, dtype=torch.float32)] * 3
    if picks is not None:
        num_picks = picks.bank_TP.shape[1]
        segments = join_segments(picks.bank_TP, spans, picks.num_partitions)
        of_picks = (picks.writes, picks.write_scale, picks.read_scale)
        scales = [torch.cat((ones, x.flatten())) for ones, x in zip(scales, of_picks, strict=True)]
    assert segments is not None
    if segments.resets is not None:
        segments, scales = _spoil(segments, scales, shared, sparse, v_THV, num_picks)
    # About as many programs as share a piece: one for each head and 64 value channels.
    programs_per_piece = num_heads * -(-v_THV.shape[-1] // 64)
    chunks_per_piece = choose_chunks_per_piece(num_tokens * (1 + num_picks), programs_per_piece)
    rows = make_rows(segments, num_tokens, num_picks, chunks_per_piece)

    initial = None if initial_YAHKV is None else by_segment(initial_YAHKV)
    operators = OPERATORS[shared.recurrence.name]
    # Products take queries and keys in the values' dtype, so they are cast before the kernels read them.
    shared, sparse = (bank.cast(v_THV.dtype) for bank in (shared, sparse or shared))
    banks = (*shared.tensors, *sparse.tensors)
    o_RHV, final = _Recurrence.apply(operators, rows, segments, initial, *banks, v_THV, *scales)
    final = final if rows.pieces.resets is None else rows.pieces.resets.settle(final)
    picked_TPHV = o_RHV[num_tokens:].unflatten(0, (num_tokens, num_picks)) if num_picks else None
    return BankOutputs(o_RHV[:num_tokens], picked_TPHV, by_span(final, spans.num_spans))


def _spoil(
    segments: Segments,
    scales: list[Tensor],
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    num_picks: int,
) -> tuple[Segments, list[Tensor]]:
    """Return segments that know the rows which are not finite, and finite scales.

    The kernels multiply by zero what belongs to other documents, so nothing that they read may be inf or nan.
    """
    assert segments.resets is not None
    shared_R = find_bad_rows(shared.g, shared.q_THK, shared.k_THK, v_THV, *shared.tensors[3:])
    bad_R = shared_R
    if sparse is not None and num_picks:
        sparse_R = find_bad_rows(sparse.g, sparse.q_THK, sparse.k_THK, v_THV, *sparse.tensors[3:])
        bad_R = torch.cat((shared_R, sparse_R.repeat_interleave(num_picks)))
    for scale in scales:
        bad_R = bad_R | ~scale.detach().isfinite()
    resets = segments.resets.spoil(segments.by_position(bad_R), segments.offsets_S1)
    spoiled_R = segments.by_row(resets.spoiled_R)
    writes, write, read = (scale.masked_fill(spoiled_R, 0) for scale in scales)
    if not shared.recurrence.delta_rule:
        # Without write strengths, these scales are of log decays alone, of which resets have none (see gla.py).
        writes = writes.masked_fill(segments.by_row(resets.starts_R), 0)
    return replace(segments, resets=resets), [writes, write, read]


class _Recurrence(torch.autograd.Function):
    """The recurrence: outputs by row and final states by segment."""

    @staticmethod
    def forward(ctx, operators, rows, segments, initial_SHKV, *tensors):
        inputs = [*(x.contiguous() for x in tensors), *rows.tables]
        arguments = operators.prepare(inputs, rows.num_tokens)
        transition, increment = operators.summarize(*arguments)
        ctx.handed_on = under_way = None
        if segments.edges is not None:
            # The exchange with other ranks is differentiable itself: its graph is kept, and run in backward.
            with torch.enable_grad():
                under_way = begin_spans(transition, increment.requires_grad_(), rows.pieces, segments.edges)
        met = operators.meet(*arguments)
        if under_way is None:
            entering, final = scan_pieces(transition, increment, initial_SHKV, rows.pieces, reverse=False)
        else:
            # The graph is cut here, so that backward can run its two halves one after the other.
            local = under_way.begun, under_way.entering, under_way.final
            with torch.enable_grad():
                begun, *scanned = cut = tuple(x.detach().requires_grad_() for x in local)
                under_way = under_way._replace(begun=begun, entering=scanned[0], final=scanned[1])
                states = finish_spans(under_way, rows.pieces, segments.edges)
            ctx.handed_on = increment, local, cut, states
            entering, final = (x.detach() for x in states)
        reading = arguments
        if segments.resets is not None:
            entering, spoiled_R = _keep_finite(entering, rows, segments.resets)
            # Spoiled rows are read as zeros from here on, and with a factor of nan, which makes their outputs nan.
            read, row, token = (len(tensors) + x for x in (-1, 0, 1))
            inputs[token] = inputs[token].masked_fill(spoiled_R, -1)
            spoiled_rows = torch.zeros_like(spoiled_R).index_copy(0, inputs[row].long(), spoiled_R)
            with_nan = [*inputs]
            with_nan[read] = inputs[read].masked_fill(spoiled_rows, torch.nan)
            reading = operators.with_inputs(arguments, with_nan)
        ctx.save_for_backward(transition, entering, *inputs)
        ctx.operators, ctx.rows, ctx.has_initial = operators, rows, initial_SHKV is not None
        return operators.attend(*reading, met, entering), final

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
            again = operators.again(*arguments, entering)
        else:
            increment, local, cut, states = ctx.handed_on
            # The first half starts to exchange gradients, the second waits for them.
            grad_local = torch.autograd.grad(states, cut, (grad_entering, grad_final))
            again = operators.again(*arguments, entering)
            (grad_leaving,), grad_initial = torch.autograd.grad(local, increment, grad_local), None
        *grads, grad_write, grad_read = operators.attend_backward(*arguments, again, grad_o_RHV, grad_leaving)
        shared, sparse = zip(*(_by_token(grad, num_tokens) for grad in grads), strict=True)
        # All banks see the same values, so the gradients of both kinds of rows add up.
        grad_v = shared[-1] if sparse[-1] is None else shared[-1] + sparse[-1]
        banks = (*shared[:-1], *sparse[:-1])
        return None, None, None, grad_initial if ctx.has_initial else None, *banks, grad_v, None, grad_write, grad_read


def _keep_finite(entering_M: Tensor, rows: Rows, resets: Resets) -> tuple[Tensor, Tensor]:
    """Return the states that enter the pieces with zeros for those that hold inf or nan, and which rows are spoiled.

    Spoiled are, at sorted positions, the rows that read such a state, besides those that are spoiled already.
    """
    pieces, position_R = rows.pieces, torch.arange(len(rows.row_R), device=rows.row_R.device)
    flat_M = entering_M.flatten(1)
    bad_M = ~(flat_M.amin(1).isfinite() & flat_M.amax(1).isfinite())
    # Ends never fall: a row's piece is the first that ends behind it.
    piece_R = torch.searchsorted(pieces.end_M, position_R, right=True)
    reads_R = ~resets.inside(pieces.start_M[piece_R], position_R + 1)
    return entering_M.masked_fill(bad_M[:, None, None, None], 0), resets.spoiled_R | (bad_M[piece_R] & reads_R)


def _by_token(grad_R: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return gradients by token: from the shared bank's rows, and from the picks' rows, summed over the picks."""
    if grad_R.shape[0] == num_tokens:
        return grad_R, None
    return grad_R[:num_tokens], grad_R[num_tokens:].unflatten(0, (num_tokens, -1)).sum(1)
