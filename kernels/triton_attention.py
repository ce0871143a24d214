"""SSE attention with Triton kernels: a recurrence's operators on pieces, and between them the scan over pieces."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sse.chunking import choose_chunks_per_piece
from megatron_sse.kernels.banks import BankInputs, BankOutputs, Picks, by_segment, by_span
from megatron_sse.kernels.scan import begin_spans, finish_spans, scan_pieces
from megatron_sse.kernels.segments import Spans
from megatron_sse.kernels.triton import gdn, gla, kda
from megatron_sse.kernels.triton.finite import keep_finite
from megatron_sse.kernels.triton.normalize import normalize
from megatron_sse.kernels.triton_rows import lay_out
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


def _kda_arguments(inputs: list[Tensor], num_tokens: int) -> tuple:
    return inputs, num_tokens, kda.kda_prepare(inputs, num_tokens)


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
    "kda": Operators(
        prepare=_kda_arguments,
        with_inputs=lambda arguments, inputs: (inputs, *arguments[1:]),
        summarize=kda.kda_summarize,
        meet=lambda *arguments: (),
        attend=lambda *arguments: kda.kda_attend(*arguments[:-2], arguments[-1]),
        summarize_backward=kda.kda_summarize_backward,
        again=kda.kda_again,
        attend_backward=kda.kda_attend_backward,
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
    """Compute kernels.sse.sse_attention.

    picks: all partitions where the form is mask.
    """
    num_tokens, num_heads = v_THV.shape[:2]
    num_picks, edges = 0, spans.edges
    if picks is not None:
        num_picks = picks.bank_TP.shape[1]
        edges = edges and edges.of_banks(spans.num_spans, picks.num_partitions)
    # An expanded decay is written out once, for all that read it.
    banks = tuple(x.contiguous() for x in _cast(shared, sparse, v_THV.dtype))
    # About as many programs as share a piece: one for each head and 64 value channels.
    programs_per_piece = num_heads * -(-v_THV.shape[-1] // 64)
    chunks_per_piece = choose_chunks_per_piece(num_tokens * (1 + num_picks), programs_per_piece)
    rows, scales, spoiled_R = lay_out(banks, v_THV, picks, spans, chunks_per_piece, shared.recurrence.delta_rule)

    initial = None if initial_YAHKV is None else by_segment(initial_YAHKV)
    operators = OPERATORS[shared.recurrence.name]
    o_RHV, final = _Recurrence.apply(operators, rows, edges, spoiled_R, initial, *banks, v_THV, *scales)
    final = final if rows.pieces.resets is None else rows.pieces.resets.settle(final)
    if not num_picks:
        return BankOutputs(o_RHV, None, by_span(final, spans.num_spans))
    # Split, not sliced: in backward, slices would each fill a tensor of all rows.
    o_THV, picked = o_RHV.split((num_tokens, num_tokens * num_picks))
    return BankOutputs(o_THV, picked.unflatten(0, (num_tokens, num_picks)), by_span(final, spans.num_spans))


def _cast(shared: BankInputs, sparse: BankInputs | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the inputs of both kinds of banks, those of the shared bank twice where there is no other.

    Products take queries and keys in the values' dtype, so they are cast before the kernels read them. Those of the
    delta rule are normalised.
    """
    if not shared.recurrence.delta_rule:
        return tuple(x for bank in (shared, sparse or shared) for x in bank.cast(dtype).tensors)
    banks = (shared,) if sparse is None else (shared, sparse)
    normalized = iter(normalize([x for bank in banks for x in (bank.q_THK, bank.k_THK)], dtype))
    both = [replace(bank, q_THK=next(normalized), k_THK=next(normalized)).tensors for bank in banks]
    return *both[0], *both[-1]


class _Recurrence(torch.autograd.Function):
    """The recurrence: outputs by row and final states by segment."""

    @staticmethod
    def forward(ctx, operators, rows, edges, spoiled_R, initial_SHKV, *tensors):
        inputs = [*(x.contiguous() for x in tensors), *rows.tables]
        arguments = operators.prepare(inputs, rows.num_tokens)
        transition, increment = operators.summarize(*arguments)
        ctx.handed_on = under_way = None
        if edges is not None:
            # The exchange with other ranks is differentiable itself: its graph is kept, and run in backward.
            with torch.enable_grad():
                under_way = begin_spans(transition, increment.requires_grad_(), rows.pieces, edges)
        met = operators.meet(*arguments)
        if under_way is None:
            entering, final = scan_pieces(transition, increment, initial_SHKV, rows.pieces, reverse=False)
        else:
            # The graph is cut here, so that backward can run its two halves one after the other.
            local = under_way.begun, under_way.entering, under_way.final
            with torch.enable_grad():
                begun, *scanned = cut = tuple(x.detach().requires_grad_() for x in local)
                under_way = under_way._replace(begun=begun, entering=scanned[0], final=scanned[1])
                states = finish_spans(under_way, rows.pieces, edges)
            ctx.handed_on = increment, local, cut, states
            entering, final = (x.detach() for x in states)
        reading = arguments
        if rows.pieces.resets is not None:
            # Spoiled rows are read as zeros from here on, and with a factor of nan, which makes their outputs nan.
            read, token = len(tensors) - 1, len(tensors) + 1
            tables = rows.pieces.start_M, rows.pieces.end_M, rows.row_R, rows.token_R, rows.run_R, spoiled_R
            with_nan = [*inputs]
            entering = entering.contiguous()
            inputs[token], with_nan[read] = keep_finite(entering, *tables, inputs[read])
            with_nan[token] = inputs[token]
            reading = operators.with_inputs(arguments, with_nan)
        ctx.save_for_backward(transition, entering, *inputs)
        ctx.operators, ctx.rows, ctx.has_initial = operators, rows, initial_SHKV is not None
        # Of final states there is often no gradient, and zeros need not be read.
        ctx.set_materialize_grads(False)
        o_RHV = operators.attend(*reading, met, entering)
        ctx.o_shape, ctx.o_dtype = o_RHV.shape, o_RHV.dtype
        return o_RHV, final

    @staticmethod
    def backward(ctx, grad_o_RHV, grad_final):
        operators, num_tokens = ctx.operators, ctx.rows.num_tokens
        transition, entering, *inputs = ctx.saved_tensors
        # Computed again rather than kept: it is as large as the queries.
        arguments = operators.prepare(inputs, num_tokens)
        if grad_o_RHV is None:
            grad_o_RHV = entering.new_zeros(ctx.o_shape, dtype=ctx.o_dtype)
        grad_o_RHV = grad_o_RHV.contiguous()
        grad_entering = operators.summarize_backward(*arguments, grad_o_RHV)
        if ctx.handed_on is None:
            pieces = ctx.rows.pieces
            grad_leaving, grad_initial = scan_pieces(transition, grad_entering, grad_final, pieces, reverse=True)
            again = operators.again(*arguments, entering)
        else:
            increment, local, cut, states = ctx.handed_on
            # The first half starts to exchange gradients, the second waits for them.
            grad_final = torch.zeros_like(states[1]) if grad_final is None else grad_final
            grad_local = torch.autograd.grad(states, cut, (grad_entering, grad_final))
            again = operators.again(*arguments, entering)
            (grad_leaving,), grad_initial = torch.autograd.grad(local, increment, grad_local), None
        *grads, grad_write, grad_read = operators.attend_backward(*arguments, again, grad_o_RHV, grad_leaving)
        # Of the size of the inputs, and not needed for the sums below.
        del again, arguments
        shared, sparse = zip(*(_by_token(grad, num_tokens) for grad in grads), strict=True)
        # All banks see the same values, so the gradients of both kinds of rows add up.
        grad_v = shared[-1] if sparse[-1] is None else shared[-1] + sparse[-1]
        banks = (*shared[:-1], *sparse[:-1])
        initial = grad_initial if ctx.has_initial else None
        return None, None, None, None, initial, *banks, grad_v, None, grad_write, grad_read


def _by_token(grad_R: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return gradients by token: from the shared bank's rows, and from the picks' rows, summed over the picks."""
    if grad_R.shape[0] == num_tokens:
        return grad_R, None
    of_picks = grad_R[num_tokens:].unflatten(0, (num_tokens, -1))
    return grad_R[:num_tokens], of_picks.squeeze(1) if of_picks.shape[1] == 1 else of_picks.sum(1)
