"""Gated linear attention (decay per key channel), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction, join_lower


def act(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> ChunkAction:
    """Return what chunks of rows do in S <- diag(exp(g)) S + k^T v; o = q S / sqrt(K) (arXiv 2312.06635, section 4).

    Args:
        q, k, v: [G, C, K or V], C rows in each of G chunks.
        g: [G, C, K], log decay per channel; any size, 0 (nothing forgotten) to underflow of its exponential.
    """
    q = q * q.shape[-1] ** -0.5
    scores, query, k_kept, total = decayed_scores(q, k, g.exp())
    return ChunkAction(scores @ v, query, total[..., None], k_kept.transpose(-1, -2) @ v)


def decayed_scores(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return causal scores q_t (decay_t ... decay_{s + 1}) k_s inside each chunk, and q and k decayed to its borders.

    Only products of decays occur, never a quotient or a difference of sums of logarithms: exact for any decay.

    Args:
        q, k, decay: [G, C, K], C a power of two, decay in [0, 1] per row and channel.

    Returns:
        scores [G, C, C], q decayed from the chunk's start, k decayed to its end, and the chunk's decay [G, K].
    """
    scores = (q * k).sum(-1)[..., None, None]
    q, total = q * decay, decay
    # Blocks of `half` rows are joined in pairs; q and k are decayed to the borders of their block at every level. Of 4
    # rows, blocks of 1 have the scores q_t k_t; then come blocks (0 1) and (2 3); in the block of 4, queries 2 and 3
    # meet keys 0 and 1, with q decayed from the start of its half (row 2) and k to the end of its half (row 1).
    half = 1
    while half < q.shape[-2]:
        (q_early, q_late), (k_early, k_late) = _pairs(q, half), _pairs(k, half)
        total_early, total_late = _pairs(total, 1)
        met = (q_late * k_early).sum(-1, keepdim=True) if half == 1 else q_late @ k_early.transpose(-1, -2)
        scores_early, scores_late = scores.unflatten(1, (-1, 2)).unbind(2)
        scores = join_lower(scores_early, met, scores_late)
        q = torch.stack((q_early, q_late * total_early), dim=-3).flatten(-4, -2)
        k = torch.stack((k_early * total_late, k_late), dim=-3).flatten(-4, -2)
        total = (total_early * total_late).squeeze(-2)
        half *= 2
    return scores[:, 0], q, k, total[:, 0]


def _pairs(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """Return [G, C, c] as early and late halves [G, C / (2 half), half, c] of neighbouring blocks."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)
