"""The gated delta rule, chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction, join_lower, run_chunks
from megatron_sse.kernels.segments import Segments


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim, as in the authors' kernels; at least in fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunk_gdn(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    initial_SHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) (I - beta k k^T) S + beta k v^T; o = q S / sqrt(K), restarted in every segment (arXiv 2412.06464).

    Args:
        q_THK, k_THK, v_THV: queries, keys, values of T rows; keys of norm <= 1 (see l2_normalize).
        g_TH: log decay per head, <= 0.
        beta_TH: write strength, in [0, 1], or up to 2 where negative eigenvalues are allowed.
        segments: which rows form which segment, in which order.
        initial_SHKV: the state that enters each segment; None for zeros.

    Returns:
        o_THV in v's dtype and final_SHKV; all arithmetic and the states are in fp32, or fp64 where an input is.
    """
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    rows = (q_THK, k_THK, v_THV, g_TH[..., None], beta_TH[..., None])
    o_THV, final_SHKV = run_chunks(_act, tuple(x.to(dtype) for x in rows), segments, initial_SHKV)
    return o_THV.to(v_THV.dtype), final_SHKV


def _act(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> ChunkAction:
    key_dim = k.shape[-1]
    q = q * key_dim**-0.5
    pair_decay = _pair_decay(g)
    from_start, to_end = pair_decay[:, :, :1] * g[:, :1].exp(), pair_decay[:, -1:].transpose(-1, -2)

    # WY form: what a token writes is u - w S, with S the state entering the chunk.
    keys_met = (beta * (k @ k.transpose(-1, -2)) * pair_decay).tril(-1)
    written = _SolveUnitLower.apply(keys_met, torch.cat((beta * v, beta * from_start * k), dim=-1))
    u, w = written.split((v.shape[-1], key_dim), dim=-1)

    k_kept = (k * to_end).transpose(-1, -2)
    identity = torch.eye(key_dim, dtype=q.dtype, device=q.device)
    scores = (q @ k.transpose(-1, -2)) * pair_decay
    return ChunkAction(
        within=scores @ u,
        query=q * from_start - scores @ w,
        transition=from_start[:, -1:] * identity - k_kept @ w,
        increment=k_kept @ u,
    )


def _pair_decay(g: Tensor) -> Tensor:
    """exp(g_t + ... + g_{s + 1}) for s <= t, [M, C, C]; each sum on its own, a difference of two would lose digits."""
    up_to_t = g.transpose(-1, -2).expand(-1, g.shape[1], -1).tril()
    after_s = g.new_ones(g.shape[1], g.shape[1]).tril(-1)
    return (up_to_t @ after_s).exp().tril()


class _SolveUnitLower(torch.autograd.Function):
    """(1 + L)^-1 B for strictly lower L [M, C, C], C a power of two; inverted in blocks: faster than batched solves."""

    @staticmethod
    def forward(ctx, lower, b):
        num_matrices, size, _ = lower.shape
        inverse = lower.new_ones(num_matrices, size, 1, 1)
        half = 1
        while half < size:
            # The block below the diagonal of each pair of blocks: [M, C / (2 half), half, half].
            blocks = lower.view(num_matrices, -1, 2, half, size // (2 * half), 2, half)[:, :, 1, :, :, 0]
            below = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
            early, late = inverse.unflatten(1, (-1, 2)).unbind(2)
            inverse = join_lower(early, -late @ (below @ early), late)
            half *= 2
        inverse = inverse[:, 0]
        x = inverse @ b
        ctx.save_for_backward(inverse, x)
        return x

    @staticmethod
    def backward(ctx, grad_x):
        inverse, x = ctx.saved_tensors
        grad_b = inverse.transpose(-1, -2) @ grad_x
        return -(grad_b @ x.transpose(-1, -2)).tril(-1), grad_b
