"""Sparse State Expansion over a recurrence: one shared bank and N partitions (arXiv 2507.16577, section 3).

Two parallel forms with one result. `mask`: N + 1 virtual heads, what a token did not pick is zeroed; work grows with N.
`varlen`: the picks sorted by (document, partition, position), one segment each; work grows with the picks, not with N.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sse.kernels.gdn import chunk_gdn, l2_normalize
from megatron_sse.kernels.gla import chunk_gla
from megatron_sse.kernels.routing import Routes, sort_by_segment
from megatron_sse.kernels.segments import Edges, Segments


@dataclass(frozen=True)
class BankInputs:
    """What one kind of bank (shared or sparse) sees of T tokens.

    q_THK, k_THK: queries and keys; H divides the values' heads.
    g: log decay, [T, H, K] for GLA, [T, H of the values] for the delta rule.
    beta_TH: write strength of the delta rule, None for GLA.
    """

    q_THK: Tensor
    k_THK: Tensor
    g: Tensor
    beta_TH: Tensor | None = None

    def expand_heads(self, num_heads: int) -> "BankInputs":
        """Repeat each key head for its group of value heads."""
        repeats = num_heads // self.q_THK.shape[1]
        if repeats == 1:
            return self
        q, k = (x.repeat_interleave(repeats, dim=1) for x in (self.q_THK, self.k_THK))
        g = self.g.repeat_interleave(repeats, dim=1) if self.beta_TH is None else self.g
        return BankInputs(q, k, g, self.beta_TH)

    def normalize(self) -> "BankInputs":
        return replace(self, q_THK=l2_normalize(self.q_THK), k_THK=l2_normalize(self.k_THK))

    def map(self, function) -> "BankInputs":
        beta = None if self.beta_TH is None else function(self.beta_TH)
        return BankInputs(function(self.q_THK), function(self.k_THK), function(self.g), beta)


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
    initial_DBHKV: Tensor | None = None,
    edges: Edges | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the shared bank and the picked partitions after writing to them.

    Args:
        shared, sparse: inputs of bank 0 and of banks 1 .. N; the delta rule (beta given) normalises q and k itself.
            sparse and routes are None where there are no partitions: plain gated linear attention or delta rule.
        v_THV: values, seen by all banks.
        routes: the tokens' picks.
        offsets_D1: int64 [D + 1], the documents' offsets over the tokens. document_T: int64 [T], each token's document.
        form: "varlen" or "mask".
        gate: "post_norm": the picks' weights scale what is written and read, after the normalisation; "reference"
            (delta rule only): they scale k and q before the normalisation, which cancels them, as the authors do.
        weight_writes, weight_reads: whether the picks' probabilities scale writes and reads.
        initial_DBHKV: states [D, N + 1, H, K, V] that enter the documents; None for zeros.
        edges: documents that go on in tokens held elsewhere; excludes initial_DBHKV.

    Returns:
        o_THV, shared plus sparse outputs, and final states [D, N + 1, H, K, V].
    """
    num_heads = v_THV.shape[1]
    documents = Segments(offsets_D1, edges=edges)
    shared = shared.expand_heads(num_heads)
    if shared.beta_TH is not None:
        shared = shared.normalize()
    if sparse is None or routes is None:
        initial = None if initial_DBHKV is None else initial_DBHKV[:, 0]
        o_THV, final = _recur(shared, v_THV, documents, initial)
        return o_THV, final[:, None]
    sparse = sparse.expand_heads(num_heads)
    if sparse.beta_TH is not None and gate == "post_norm":
        sparse = sparse.normalize()
    picks = _Picks.of(routes, v_THV, weight_writes, weight_reads, before_norm=gate == "reference")
    run = {"varlen": _run_varlen, "mask": _run_mask}[form]
    return run(shared, sparse, v_THV, routes, picks, documents, document_T, initial_DBHKV)


@dataclass(frozen=True)
class _Picks:
    """Per pick [T, P] or, in mask form, per partition [T, N]: whether it writes, and the scales of write and read."""

    writes: Tensor
    write_scale: Tensor
    read_scale: Tensor
    before_norm: bool

    @staticmethod
    def of(routes: Routes, v: Tensor, weight_writes: bool, weight_reads: bool, before_norm: bool) -> "_Picks":
        dtype = torch.promote_types(v.dtype, torch.float32)
        write_scale, read_scale = routes.write_weight_TP(weight_writes), routes.read_weight_TP(weight_reads)
        return _Picks(routes.write_weight_TP(False).to(dtype), write_scale.to(dtype), read_scale.to(dtype), before_norm)

    def scatter(self, routes: Routes) -> "_Picks":
        writes, write_scale, read_scale = (routes.scatter(x) for x in (self.writes, self.write_scale, self.read_scale))
        return replace(self, writes=writes, write_scale=write_scale, read_scale=read_scale)

    def apply(self, bank: BankInputs, v: Tensor) -> tuple[BankInputs, Tensor]:
        """Scale and mask inputs [T, P, H, ...] of the picks, before the recurrence."""
        writes, write_scale, read_scale = (x[..., None, None] for x in (self.writes, self.write_scale, self.read_scale))
        if bank.beta_TH is None:
            return replace(bank, g=bank.g * writes), v * write_scale
        bank = replace(bank, g=bank.g * writes[..., 0], beta_TH=bank.beta_TH * writes[..., 0])
        if not self.before_norm:
            return bank, v * write_scale
        q, k = bank.q_THK * read_scale, bank.k_THK * write_scale
        return replace(bank, q_THK=q, k_THK=k).normalize(), v

    def combine(self, o: Tensor) -> Tensor:
        """Sum the picks' outputs [T, P, H, V] into [T, H, V]."""
        return o.sum(1) if self.before_norm else (o * self.read_scale[..., None, None]).sum(1)


def _recur(bank: BankInputs, v: Tensor, segments: Segments, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    if bank.beta_TH is None:
        return chunk_gla(bank.q_THK, bank.k_THK, v, bank.g, segments, initial)
    return chunk_gdn(bank.q_THK, bank.k_THK, v, bank.g, bank.beta_TH, segments, initial)


def _join(shared: BankInputs, sparse: BankInputs, v: Tensor, v_sparse: Tensor, dim: int) -> tuple[BankInputs, Tensor]:
    beta = None
    if shared.beta_TH is not None and sparse.beta_TH is not None:
        beta = torch.cat((shared.beta_TH, sparse.beta_TH), dim)
    q, k, g, v = (
        torch.cat((a.to(b.dtype), b), dim)
        for a, b in ((shared.q_THK, sparse.q_THK), (shared.k_THK, sparse.k_THK), (shared.g, sparse.g), (v, v_sparse))
    )
    return BankInputs(q, k, g, beta), v


def _run_varlen(shared, sparse, v_THV, routes, picks, documents, document_T, initial_DBHKV):
    """Rows 0 .. T - 1 are the shared bank's tokens, rows T + t * P + p the picks; all are gathered into chunks once."""
    num_tokens, num_picks = routes.bank_TP.shape
    num_documents, num_partitions = documents.num_segments, routes.num_partitions
    order, offsets = sort_by_segment(routes.bank_TP, document_T, num_documents, num_partitions)
    row = torch.cat((torch.arange(num_tokens, device=order.device), num_tokens + order))
    edges = documents.edges and documents.edges.of_banks(num_documents, num_partitions)
    segments = Segments(torch.cat((documents.offsets_S1, num_tokens + offsets[1:])), row, edges)

    picked = sparse.map(lambda x: x[:, None].expand(-1, num_picks, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_picks, *v_THV.shape[1:]))
    joined, v = _join(shared, picked.map(lambda x: x.flatten(0, 1)), v_THV, v_picked.flatten(0, 1), dim=0)

    initial = None
    if initial_DBHKV is not None:
        initial = torch.cat((initial_DBHKV[:, 0], initial_DBHKV[:, 1:].flatten(0, 1)))
    o, final = _recur(joined, v, segments, initial)
    o_sparse = picks.combine(o[num_tokens:].unflatten(0, (num_tokens, num_picks)))
    final_shared, final_sparse = final[:num_documents, None], final[num_documents:]
    final_DBHKV = torch.cat((final_shared, final_sparse.unflatten(0, (num_documents, num_partitions))), dim=1)
    return (o[:num_tokens] + o_sparse).to(v_THV.dtype), final_DBHKV


def _run_mask(shared, sparse, v_THV, routes, picks, documents, document_T, initial_DBHKV):
    """Banks become heads: [T, (N + 1) H, ...], one segment per document."""
    num_banks, num_heads = 1 + routes.num_partitions, v_THV.shape[1]
    picks = picks.scatter(routes)
    picked = sparse.map(lambda x: x[:, None].expand(-1, num_banks - 1, *x.shape[1:]))
    picked, v_picked = picks.apply(picked, v_THV[:, None].expand(-1, num_banks - 1, *v_THV.shape[1:]))
    joined, v = _join(shared, picked.map(lambda x: x.flatten(1, 2)), v_THV, v_picked.flatten(1, 2), dim=1)

    initial = None if initial_DBHKV is None else initial_DBHKV.flatten(1, 2)
    o, final = _recur(joined, v, documents, initial)
    o_sparse = picks.combine(o[:, num_heads:].unflatten(1, (num_banks - 1, num_heads)))
    return (o[:, :num_heads] + o_sparse).to(v_THV.dtype), final.unflatten(1, (num_banks, num_heads))
