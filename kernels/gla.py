"""Gated linear attention (decay per key channel), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction, decayed_scores, run_chunks
from megatron_sse.kernels.segments import Segments


def chunk_gla(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    segments: Segments,
    initial_SHKV: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """S <- diag(exp(g)) S + k^T v; o = q S / sqrt(K), restarted in every segment (arXiv 2312.06635, section 4).

    Args:
        q_THK, k_THK, v_THV: queries, keys, values of T rows.
        g_THK: log decay per channel, <= 0; any size, 0 (nothing forgotten) to underflow of its exponential.
        segments: which rows form which segment, in which order.
        initial_SHKV: the state that enters each segment; None for zeros.
        chunk_size: rows per chunk, a power of two.

    Returns:
        o_THV in v's dtype and final_SHKV; all arithmetic and the states are in fp32, or fp64 where an input is.
    """
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    rows = (q_THK, k_THK, v_THV, g_THK)
    o_THV, final_SHKV = run_chunks(_act, tuple(x.to(dtype) for x in rows), segments, initial_SHKV, chunk_size)
    return o_THV.to(v_THV.dtype), final_SHKV


def _act(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> ChunkAction:
    q = q * q.shape[-1] ** -0.5
    scores, query, k_kept, total = decayed_scores(q, k, g.exp())
    return ChunkAction(scores @ v, query, total[..., None], k_kept.transpose(-1, -2) @ v)
