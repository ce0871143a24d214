"""Gated linear attention (decay per key channel), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction, join_lower, run_chunks
from megatron_sse.kernels.segments import Segments


def chunk_gla(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    segments: Segments,
    initial_SHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S <- diag(exp(g)) S + k^T v; o = q S / sqrt(K), restarted in every segment (arXiv 2312.06635, section 4).

    Args:
        q_THK, k_THK, v_THV: queries, keys, values of T rows.
        g_THK: log decay per channel, <= 0; any size, 0 (nothing forgotten) to underflow of its exponential.
        segments: which rows form which segment, in which order.
        initial_SHKV: the state that enters each segment; None for zeros.

    Returns:
        o_THV in v's dtype and final_SHKV; all arithmetic and the states are in fp32, or fp64 where an input is.
    """
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    rows = (q_THK, k_THK, v_THV, g_THK)
    o_THV, final_SHKV = run_chunks(_act, tuple(x.to(dtype) for x in rows), segments, initial_SHKV)
    return o_THV.to(v_THV.dtype), final_SHKV


def _act(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> ChunkAction:
    q = q * q.shape[-1] ** -0.5
    scores, query, k_kept, total = _decayed_scores(q, k, g.exp())
    return ChunkAction(scores @ v, query, total[..., None], k_kept.transpose(-1, -2) @ v)


def _decayed_scores(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal scores q_t (decay_t ... decay_{s + 1}) k_s inside each chunk, and q and k decayed to its borders.

    Only products of decays occur, never a quotient or a difference of sums of logarithms: exact for any decay.

    Args:
        q, k, decay: [M, C, K], C a power of two, decay in [0, 1] per row and channel.

    Returns:
        scores [M, C, C], q decayed from the chunk's start, k decayed to its end, and the chunk's decay [M, K].
    """
    scores_BCC = (q * k).sum(-1)[..., None, None]
    q, total = q * decay, decay
    # Blocks of `half` rows are joined in pairs; q and k are decayed to the borders of their block at every level.
    half = 1
    while half < q.shape[-2]:
        (q_early, q_late), (k_early, k_late) = _pairs(q, half), _pairs(k, half)
        total_early, total_late = _pairs(total, 1)
        met = (q_late * k_early).sum(-1, keepdim=True) if half == 1 else q_late @ k_early.transpose(-1, -2)
        scores_early, scores_late = scores_BCC.unflatten(1, (-1, 2)).unbind(2)
        scores_BCC = join_lower(scores_early, met, scores_late)
        q = torch.stack((q_early, q_late * total_early), dim=-3).flatten(-4, -2)
        k = torch.stack((k_early * total_late, k_late), dim=-3).flatten(-4, -2)
        total = (total_early * total_late).squeeze(-2)
        half *= 2
    return scores_BCC[:, 0], q, k, total[:, 0]


def _pairs(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """[M, C, D] as early and late halves [M, C / (2 half), half, D] of neighbouring blocks."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)
