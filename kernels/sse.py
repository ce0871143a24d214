"""Sparse State Expansion over a recurrence: one shared bank and N partitions (arXiv 2507.16577, section 3).

Two parallel forms with one result. `mask`: N + 1 virtual heads, what a token did not pick is zeroed; work grows with N.
`varlen`: the picks sorted by (span, partition, position), one segment each; work grows with the picks, not with N.
A span is a run of tokens, and the documents that start in it reset the states: work does not grow with the documents.
"""

import torch
from torch import Tensor

from megatron_sse.kernels.backend import use_triton
from megatron_sse.kernels.banks import BEFORE_NORM, BankInputs, BankOutputs, Picks, by_segment, by_span
from megatron_sse.kernels.registry import run_recurrence
from megatron_sse.kernels.routing import Routes, join_segments
from megatron_sse.kernels.segments import Edges, Spans


def sse_attention(
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    routes: Routes | None,
    offsets_Y1: Tensor,
    span_T: Tensor,
    document_T: Tensor | None = None,
    *,
    form: str = "varlen",
    gate: str = "post_norm",
    weight_writes: bool = True,
    weight_reads: bool = True,
    initial_YAHKV: Tensor | None = None,
    edges: Edges | None = None,
) -> BankOutputs:
    """Read the shared bank and the picked partitions after writing to them.

    Args:
        shared, sparse: inputs of bank 0 and of banks 1 .. N; their tensors say which recurrence (see BankInputs), and q
            and k of the delta rule are normalised here.
            sparse and routes are None where there are no partitions: plain gated linear attention or delta rule.
        v_THV: values, seen by all banks.
        routes: the tokens' picks.
        offsets_Y1: int64 [Y + 1], the spans' offsets over the tokens. span_T: int64, each token's span.
        document_T: int64, each token's document, which starts from empty states inside a span, and of which no value
            reaches another one, inf and nan included; None where each span is one document.
        form: "varlen" or "mask".
        gate: "post_norm": the picks' weights scale what is written and read, after the normalisation; "reference"
            (delta rule only): they scale k and q before the normalisation, which cancels them, as the authors do.
        weight_writes, weight_reads: whether the picks' probabilities scale writes and reads.
        initial_YAHKV: states [Y, A, H, K, V] that enter the spans' first documents; None for zeros.
        edges: spans that continue in tokens held elsewhere; excludes initial_YAHKV.

    Raises KeyError for a form or gate that does not exist.
    """
    is_mask, before_norm = {"varlen": False, "mask": True}[form], BEFORE_NORM[gate]
    spans = Spans(offsets_Y1, span_T, document_T, edges)
    recurrence = shared.recurrence
    picks = None
    if sparse is not None and routes is not None:
        picks = Picks.of(routes, v_THV.dtype, weight_writes, weight_reads, before_norm)
    if use_triton(v_THV) and recurrence.has_triton and not before_norm:
        # Imported late: Triton is not installed on machines without a GPU.
        from megatron_sse.kernels.triton_attention import attend_banks

        picks = picks.spread() if picks is not None and is_mask else picks
        return attend_banks(shared, sparse, v_THV, picks, spans, initial_YAHKV)
    if recurrence.delta_rule:
        shared = shared.normalize()
        if sparse is not None and not before_norm:
            sparse = sparse.normalize()
    shared = shared.expand_heads(v_THV.shape[1])
    if sparse is None or picks is None:
        initial = None if initial_YAHKV is None else initial_YAHKV[:, 0]
        o_THV, final = run_recurrence(shared, v_THV, spans.segments(), initial)
        return BankOutputs(o_THV, None, final[:, None])
    sparse = sparse.expand_heads(v_THV.shape[1])
    if is_mask:
        return _run_mask(shared, sparse, v_THV, picks.spread(), spans, initial_YAHKV)
    return _run_varlen(shared, sparse, v_THV, picks, spans, initial_YAHKV)


def _join(shared: BankInputs, sparse: BankInputs, v: Tensor, v_sparse: Tensor, dim: int) -> tuple[BankInputs, Tensor]:
    beta = None
    if shared.beta_TH is not None and sparse.beta_TH is not None:
        beta = torch.cat((shared.beta_TH, sparse.beta_TH), dim)
    q, k, g, v = (
        torch.cat((a.to(b.dtype), b), dim)
        for a, b in ((shared.q_THK, sparse.q_THK), (shared.k_THK, sparse.k_THK), (shared.g, sparse.g), (v, v_sparse))
    )
    return BankInputs(q, k, g, beta), v


def _run_varlen(shared, sparse, v_THV, picks, spans, initial_YAHKV):
    """Run one recurrence over the rows of all banks: row t < T is the shared bank's, row T + t * P + p a pick."""
    num_tokens, num_picks = picks.bank_TP.shape
    segments = join_segments(picks.bank_TP, spans, picks.num_partitions)
    picked = sparse.map(lambda x: x[:, None].expand(-1, num_picks, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_picks, *v_THV.shape[1:]))
    # Token t's pick p lands in row T + t * P + p, as join_segments expects.
    joined, v = _join(shared, picked.map(lambda x: x.flatten(0, 1)), v_THV, v_picked.flatten(0, 1), dim=0)

    o, final = run_recurrence(joined, v, segments, None if initial_YAHKV is None else by_segment(initial_YAHKV))
    picked_TPHV = picks.weigh(o[num_tokens:].unflatten(0, (num_tokens, num_picks)))
    return BankOutputs(o[:num_tokens].to(v_THV.dtype), picked_TPHV, by_span(final, spans.num_spans))


def _run_mask(shared, sparse, v_THV, picks, spans, initial_YAHKV):
    """Run all banks as heads, [T, A * H, ...], with one segment per span."""
    num_partitions, num_heads = picks.num_partitions, v_THV.shape[1]
    picked = sparse.map(lambda x: x[:, None].expand(-1, num_partitions, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_partitions, *v_THV.shape[1:]))
    joined, v = _join(shared, picked.map(lambda x: x.flatten(1, 2)), v_THV, v_picked.flatten(1, 2), dim=1)

    o, final = run_recurrence(
        joined, v, spans.segments(), None if initial_YAHKV is None else initial_YAHKV.flatten(1, 2)
    )
    picked_TPHV = picks.weigh(o[:, num_heads:].unflatten(1, (num_partitions, num_heads)))
    final_YAHKV = final.unflatten(1, (1 + num_partitions, num_heads))
    return BankOutputs(o[:, :num_heads].to(v_THV.dtype), picked_TPHV, final_YAHKV)
