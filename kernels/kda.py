"""The delta rule with a decay per key channel (Kimi Delta Attention), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction
from megatron_sse.kernels.gdn import solve_unit_lower
from megatron_sse.kernels.gla import decayed_scores


def act(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> ChunkAction:
    """Return what chunks of rows do in S <- (I - beta k^T k) diag(exp(g)) S + beta k^T v; o = q S / sqrt(K).

    arXiv 2510.26692, section 3.

    Args:
        q, k, v: [G, C, K or V], C rows in each of G chunks; keys of norm <= 1 (see l2_normalize).
        g: [G, C, K], log decay per channel, <= 0.
        beta: [G, C, 1], write strength, in [0, 1], or up to 2 where negative eigenvalues are allowed.
    """
    q, decay = q * q.shape[-1] ** -0.5, g.exp()
    scores, query, k_kept, total = decayed_scores(q, k, decay)
    keys_met, k_from_start, _, _ = decayed_scores(k, k, decay)
    # WY form, as in gdn.py: a token writes u - w S, with S the state that enters the chunk.
    written = solve_unit_lower((beta * keys_met).tril(-1), torch.cat((beta * v, beta * k_from_start), dim=-1))
    u, w = written.split((v.shape[-1], k.shape[-1]), dim=-1)
    k_kept = k_kept.transpose(-1, -2)
    return ChunkAction(
        within=scores @ u,
        query=query - scores @ w,
        transition=torch.diag_embed(total) - k_kept @ w,
        increment=k_kept @ u,
    )
