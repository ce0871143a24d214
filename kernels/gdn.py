"""The gated delta rule, chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.scan import scan_states
from megatron_sse.kernels.segments import Segments, from_chunks, make_grid, to_chunks


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim, as in the authors' kernels."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunk_gdn(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    initial_SHKV: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) (I - beta k k^T) S + beta k v^T; o = q S / sqrt(K), restarted in every segment (arXiv 2412.06464).

    Args:
        q_THK, k_THK, v_THV: queries, keys, values of T rows; keys of norm <= 1 (see l2_normalize).
        g_TH: log decay per head, <= 0.
        beta_TH: write strength, in [0, 1], or up to 2 where negative eigenvalues are allowed.
        segments: which rows form which segment, in which order.
        initial_SHKV: the state that enters each segment; None for zeros.
        chunk_size: rows per chunk.

    Returns:
        o_THV in v's dtype and final_SHKV; all arithmetic and the states are in fp32, or fp64 where an input is.
    """
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    grid = make_grid(segments, q_THK.shape[0], chunk_size)
    q, k, v = (to_chunks(x.to(dtype), grid) for x in (q_THK, k_THK, v_THV))
    g, beta = (to_chunks(x.to(dtype)[..., None], grid) for x in (g_TH, beta_TH))
    q = q * q.shape[-1] ** -0.5
    decay = g.cumsum(-2)
    total = decay[..., -1:, :]

    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).triu(1)
    # Masked before the exponential: above the diagonal the exponents are positive and may overflow.
    pair_decay = (decay - decay.transpose(-1, -2)).masked_fill(future, float("-inf")).exp()

    # WY form: what a token writes is u - w S, with S the state entering the chunk.
    keys_met = (beta * (k @ k.transpose(-1, -2)) * pair_decay).tril(-1)
    written = torch.cat((beta * v, beta * decay.exp() * k), dim=-1)
    written = torch.linalg.solve_triangular(keys_met, written, upper=False, unitriangular=True)
    u, w = written.split((v.shape[-1], k.shape[-1]), dim=-1)

    k_kept = (k * (total - decay).exp()).transpose(-1, -2)
    identity = torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    transition = total.exp() * identity - k_kept @ w
    entering, final_SHKV = scan_states(transition, k_kept @ u, grid, initial_SHKV)
    scores = (q @ k.transpose(-1, -2)) * pair_decay
    o = (q * decay.exp()) @ entering + scores @ (u - w @ entering)
    return from_chunks(o, grid).to(v_THV.dtype), final_SHKV
