"""Gated linear attention (decay per key channel), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction


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
    return _DecayedScores.apply(q, k, decay)


class _DecayedScores(torch.autograd.Function):
    """Written by hand, since autograd would copy queries, keys and scores at every level, which takes most of the time.

    Blocks of `half` rows are joined in pairs; q and k are decayed to the borders of their block at every level. Of 4
    rows, blocks of 1 have the scores q_t k_t; then come blocks (0 1) and (2 3); in the block of 4, queries 2 and 3 meet
    keys 0 and 1, with q decayed from the start of its half (row 2) and k to the end of its half (row 1).
    """

    @staticmethod
    def forward(ctx, q, k, decay):
        scores = q.new_zeros(*q.shape[:2], q.shape[1])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        query, kept, total = q * decay, k.clone(), decay
        levels = []
        half = 1
        while half < q.shape[-2]:
            query_late, kept_early = _halves(query, half)[1], _halves(kept, half)[0]
            # Copies, also where these are all of a chunk: both are multiplied in place below.
            q_late, k_early = (x.clone(memory_format=torch.contiguous_format) for x in (query_late, kept_early))
            total_early, total_late = _halves(total, 1)
            met = (q_late * k_early).sum(-1, keepdim=True) if half == 1 else q_late @ k_early.transpose(-1, -2)
            _below(scores, half).copy_(met)
            query_late.mul_(total_early)
            kept_early.mul_(total_late)
            levels += [q_late, k_early, total_early, total_late]
            total = (total_early * total_late).squeeze(-2)
            half *= 2
        ctx.save_for_backward(q, k, decay, *levels)
        return scores, query, kept, total[:, 0]

    @staticmethod
    def backward(ctx, grad_scores, grad_query, grad_kept, grad_total):
        q, k, decay, *levels = ctx.saved_tensors
        grad_q, grad_k, grad_total = grad_query.clone(), grad_kept.clone(), grad_total[:, None]
        for level in reversed(range(len(levels) // 4)):
            q_late, k_early, total_early, total_late = levels[4 * level : 4 * level + 4]
            half = 2**level
            grad_late, grad_early = _halves(grad_q, half)[1], _halves(grad_k, half)[0]
            grad_total = grad_total.unsqueeze(-2)
            of_early = (grad_late * q_late).sum(-2, keepdim=True) + grad_total * total_late
            of_late = (grad_early * k_early).sum(-2, keepdim=True) + grad_total * total_early
            grad_met = _below(grad_scores, half).contiguous()
            grad_late.mul_(total_early).add_(grad_met @ k_early)
            grad_early.mul_(total_late).add_(grad_met.transpose(-1, -2) @ q_late)
            grad_total = torch.stack((of_early, of_late), dim=-3).flatten(-4, -2)
        of_diagonal = grad_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        return grad_q * decay + of_diagonal * k, grad_k + of_diagonal * q, grad_total + grad_q * q


def _halves(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """Return [G, C, c] as early and late halves [G, C / (2 half), half, c] of neighbouring blocks."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def _below(scores: Tensor, half: int) -> Tensor:
    """Return a view of scores [G, C, C], where late halves of blocks meet early ones: [G, C / (2 half), half, half]."""
    blocks = scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (-1, 2, half))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
