"""The gated delta rule (a decay per head), chunked, in torch."""

import torch
from torch import Tensor

from megatron_sse.kernels.chunks import ChunkAction, join_lower


def act(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> ChunkAction:
    """Return what chunks of rows do in S <- exp(g) (I - beta k^T k) S + beta k^T v; o = q S / sqrt(K).

    arXiv 2412.06464, section 3.

    Args:
        q, k, v: [G, C, K or V], C rows in each of G chunks; keys of norm <= 1 (see l2_normalize).
        g: [G, C, 1], log decay, <= 0.
        beta: [G, C, 1], write strength, in [0, 1], or up to 2 where negative eigenvalues are allowed.
    """
    key_dim = k.shape[-1]
    q = q * key_dim**-0.5
    pair_decay = _pair_decay(g)
    from_start, to_end = pair_decay[:, :, :1] * g[:, :1].exp(), pair_decay[:, -1:].transpose(-1, -2)

    # WY form: what a token writes is u - w S, with S the state entering the chunk.
    # How much of what row s wrote row t > s takes back: beta_t (k_t . k_s), decayed from s to t.
    keys_met = (beta * (k @ k.transpose(-1, -2)) * pair_decay).tril(-1)
    written = solve_unit_lower(keys_met, torch.cat((beta * v, beta * from_start * k), dim=-1))
    u, w = written.split((v.shape[-1], key_dim), dim=-1)

    # What the rows write enters the leaving state through their keys, decayed to the chunk's end.
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
    """Return exp(g_t + ... + g_{s + 1}) for s <= t, [G, C, C].

    Each sum is taken on its own: a difference of two running sums would lose digits.
    """
    # The product below multiplies what it leaves out by 0, so -inf becomes a number whose exponential is 0 as well.
    g = g.clamp(min=-1e30)
    # For g = a b c: up_to_t is a 0 0 | a b 0 | a b c, and its product with after_s has the last row b + c, c, 0.
    up_to_t = g.transpose(-1, -2).expand(-1, g.shape[1], -1).tril()
    after_s = g.new_ones(g.shape[1], g.shape[1]).tril(-1)
    return (up_to_t @ after_s).exp().tril()


def solve_unit_lower(lower: Tensor, b: Tensor) -> Tensor:
    """Return (1 + lower)^-1 b for strictly lower triangular `lower` [G, C, C], C a power of two."""
    return _SolveUnitLower.apply(lower, b)


class _SolveUnitLower(torch.autograd.Function):
    """(1 + lower)^-1 b, inverted in blocks, which is faster than batched solves.

    The inverse of [[early, 0], [below, late]] is [[early^-1, 0], [-late^-1 below early^-1, late^-1]]: blocks of 1, 2, 4
    rows and so on are joined in pairs.
    """

    @staticmethod
    def forward(ctx, lower, b):
        num_matrices, size, _ = lower.shape
        inverse = lower.new_ones(num_matrices, size, 1, 1)
        half = 1
        while half < size:
            # The block below the diagonal of each pair of blocks: [G, C / (2 half), half, half].
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
        # x = A^-1 b with A = 1 + lower: the gradient of b is A^-T grad_x, that of lower -grad_b x^T below the diagonal.
        return -(grad_b @ x.transpose(-1, -2)).tril(-1), grad_b
