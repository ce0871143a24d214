"""Gated linear attention (decay per key channel), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.scan import scan_states
from megatron_sse.kernels.segments import Segments, from_chunks, make_grid, to_chunks


def chunk_gla(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    segments: Segments,
    initial_SHKV: Tensor | None = None,
    chunk_size: int = 64,
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
    grid = make_grid(segments, q_THK.shape[0], chunk_size)
    q, k, v, g = (to_chunks(x.to(dtype), grid) for x in (q_THK, k_THK, v_THV, g_THK))
    q = q * q.shape[-1] ** -0.5
    decay = g.cumsum(-2)
    total = decay[..., -1:, :]

    transition = total.exp().transpose(-1, -2)
    increment = (k * (total - decay).exp()).transpose(-1, -2) @ v
    entering, final_SHKV = scan_states(transition, increment, grid, initial_SHKV)
    o = _attend_within(q, k, v, decay) + (q * decay.exp()) @ entering
    return from_chunks(o, grid).to(v_THV.dtype), final_SHKV


def _attend_within(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Causal attention inside the chunks, [G, H, C, K] and [G, H, C, V].

    A pair (query, key) is scored in the smallest aligned block whose second half holds the query and whose first half
    the key. Decays are taken relative to the end of the first half, so every exponent is <= 0: exact for any decay.
    """
    o = (q * k).sum(-1, keepdim=True) * v
    half = 1
    while half < q.shape[-2]:
        q_late, k_early, v_early, decay_late, decay_early = (
            x.unflatten(-2, (-1, 2, half))[..., side, :, :]
            for x, side in ((q, 1), (k, 0), (v, 0), (decay, 1), (decay, 0))
        )
        border = decay_early[..., -1:, :]
        scores = (q_late * (decay_late - border).exp()) @ (k_early * (border - decay_early).exp()).transpose(-1, -2)
        late = scores @ v_early
        o = o + torch.stack((torch.zeros_like(late), late), dim=-3).flatten(-4, -2)
        half *= 2
    return o
