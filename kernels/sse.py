"""Sparse State Expansion over a recurrence: one shared bank and N partitions (arXiv 2507.16577, section 3).

Two parallel forms with one result. `mask`: N + 1 virtual heads, what a token did not pick is zeroed; work grows with N.
`varlen`: the picks sorted by (document, partition, position), one segment each; work grows with the picks, not with N.
"""

import torch
from torch import Tensor

from megatron_sse.kernels.backend import use_triton
from megatron_sse.kernels.banks import BEFORE_NORM, BankInputs, BankOutputs, Picks, by_document, by_segment
from megatron_sse.kernels.registry import KERNELS, run_recurrence
from megatron_sse.kernels.routing import Routes, join_segments
from megatron_sse.kernels.segments import Edges, Segments


def sse_attention(
    shared: BankInputs,
    sparse: BankInputs | None,
    v_THV: Tensor,
    routes: Routes | None,
    offsets_D1: Tensor,
    document_T: Tensor,
    *,
    form: str = "varlen",
    gate: str = "post_norm",
    weight_writes: bool = True,
    weight_reads: bool = True,
    initial_DAHKV: Tensor | None = None,
    edges: Edges | None = None,
) -> BankOutputs:
    """Read the shared bank and the picked partitions after writing to them.

    Args:
        shared, sparse: inputs of bank 0 and of banks 1 .. N; their tensors say which recurrence (see BankInputs), and q
            and k of the delta rule are normalised here.
            sparse and routes are None where there are no partitions: plain gated linear attention or delta rule.
        v_THV: values, seen by all banks.
        routes: the tokens' picks.
        offsets_D1: int64 [D + 1], the documents' offsets over the tokens. document_T: int64 [T], each token's document.
        form: "varlen" or "mask".
        gate: "post_norm": the picks' weights scale what is written and read, after the normalisation; "reference"
            (delta rule only): they scale k and q before the normalisation, which cancels them, as the authors do.
        weight_writes, weight_reads: whether the picks' probabilities scale writes and reads.
        initial_DAHKV: states [D, A, H, K, V] that enter the documents; None for zeros.
        edges: documents that continue in tokens held elsewhere; excludes initial_DAHKV.

    Raises KeyError for a form or gate that does not exist.
    """
    is_mask, before_norm = {"varlen": False, "mask": True}[form], BEFORE_NORM[gate]
    documents = Segments(offsets_D1, edges=edges)
    recurrence = shared.recurrence
    if recurrence.delta_rule:
        shared = shared.normalize()
    picks = None
    if sparse is not None and routes is not None:
        picks = Picks.of(routes, v_THV.dtype, weight_writes, weight_reads, before_norm)
        if recurrence.delta_rule and not before_norm:
            sparse = sparse.normalize()
    if use_triton(v_THV) and KERNELS[recurrence.name].has_triton and not before_norm:
        # Imported late: Triton is not installed on machines without a GPU.
        from megatron_sse.kernels.triton_attention import attend_banks

        picks = picks.spread() if picks is not None and is_mask else picks
        return attend_banks(shared, sparse, v_THV, picks, documents, document_T, initial_DAHKV)
    shared = shared.expand_heads(v_THV.shape[1])
    if sparse is None or picks is None:
        initial = None if initial_DAHKV is None else initial_DAHKV[:, 0]
        o_THV, final = run_recurrence(shared, v_THV, documents, initial)
        return BankOutputs(o_THV, None, final[:, None])
    sparse = sparse.expand_heads(v_THV.shape[1])
    if is_mask:
        return _run_mask(shared, sparse, v_THV, picks.spread(), documents, initial_DAHKV)
    return _run_varlen(shared, sparse, v_THV, picks, documents, document_T, initial_DAHKV)


def _join(shared: BankInputs, sparse: BankInputs, v: Tensor, v_sparse: Tensor, dim: int) -> tuple[BankInputs, Tensor]:
    beta = None
    if shared.beta_TH is not None and sparse.beta_TH is not None:
        beta = torch.cat((shared.beta_TH, sparse.beta_TH), dim)
    q, k, g, v = (
        torch.cat((a.to(b.dtype), b), dim)
        for a, b in ((shared.q_THK, sparse.q_THK), (shared.k_THK, sparse.k_THK), (shared.g, sparse.g), (v, v_sparse))
    )
    return BankInputs(q, k, g, beta), v


def _run_varlen(shared, sparse, v_THV, picks, documents, document_T, initial_DAHKV):
    """Run one recurrence over the rows of all banks: row t < T is the shared bank's, row T + t * P + p a pick."""
    num_tokens, num_picks = picks.bank_TP.shape
    segments = join_segments(picks.bank_TP, document_T, documents, picks.num_partitions)
    picked = sparse.map(lambda x: x[:, None].expand(-1, num_picks, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_picks, *v_THV.shape[1:]))
    # Token t's pick p lands in row T + t * P + p, as join_segments expects.
    joined, v = _join(shared, picked.map(lambda x: x.flatten(0, 1)), v_THV, v_picked.flatten(0, 1), dim=0)

    o, final = run_recurrence(joined, v, segments, None if initial_DAHKV is None else by_segment(initial_DAHKV))
    picked_TPHV = picks.weigh(o[num_tokens:].unflatten(0, (num_tokens, num_picks)))
    return BankOutputs(o[:num_tokens].to(v_THV.dtype), picked_TPHV, by_document(final, documents.num_segments))


def _run_mask(shared, sparse, v_THV, picks, documents, initial_DAHKV):
    """Run all banks as heads, [T, A * H, ...], with one segment per document."""
    num_partitions, num_heads = picks.num_partitions, v_THV.shape[1]
    picked = sparse.map(lambda x: x[:, None].expand(-1, num_partitions, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_partitions, *v_THV.shape[1:]))
    joined, v = _join(shared, picked.map(lambda x: x.flatten(1, 2)), v_THV, v_picked.flatten(1, 2), dim=1)

    o, final = run_recurrence(joined, v, documents, None if initial_DAHKV is None else initial_DAHKV.flatten(1, 2))
    picked_TPHV = picks.weigh(o[:, num_heads:].unflatten(1, (num_partitions, num_heads)))
    final_DAHKV = final.unflatten(1, (1 + num_partitions, num_heads))
    return BankOutputs(o[:, :num_heads].to(v_THV.dtype), picked_TPHV, final_DAHKV)
