"""Gated linear attention, backward inside chunks: from the gradient of the scores, for one block of K at a time."""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gla_tiles import (
    load_log_decays,
    load_rows,
    load_runs,
    pairs_across,
    pairs_inside,
    store_rows,
    sum_from_start,
    sum_later,
    sum_to_end,
)


@triton.jit(do_not_specialize=["num_tokens"])
def gla_intra_kernel(
    q1_ptr,
    k1_ptr,
    g1_ptr,
    q2_ptr,
    k2_ptr,
    g2_ptr,
    writes_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    steep_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_scores_ptr,
    through_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_g_ptr,
    num_tokens,
    num_heads,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    MILD: tl.constexpr,
    STEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute gradients of q, k, g [R, H, K] by row, for the steep chunks or for the others (see gla_steep).

    Program (chunk and block of K, key head). The inputs (gradients of decayed queries and keys and of scores, and what
    passes through) are per value head; the GROUPS value heads of a key head are summed here.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    chunk, head = tl.program_id(0) // blocks, tl.program_id(1)
    dim_K = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if end <= start:
        return
    # Launched twice: for steep chunks, and for all others.
    if (tl.load(steep_ptr + chunk * num_heads + head) != 0) != STEEP:
        return
    q_ptr, k_ptr, g_ptr = q1_ptr, k1_ptr, g1_ptr
    if start >= num_tokens:
        q_ptr, k_ptr, g_ptr = q2_ptr, k2_ptr, g2_ptr
    position_C, dim_C = start + tl.arange(0, CHUNK), tl.arange(0, CHUNK)
    valid_C = position_C < end
    row_C = tl.load(row_ptr + position_C, mask=valid_C, other=0)
    token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
    run_C, before, last = load_runs(run_ptr, start, end, CHUNK)
    writes_C = tl.load(writes_ptr + row_C, mask=valid_C, other=0.0)
    dtype = grad_scores_ptr.dtype.element_ty

    b_grad_scores = _load_groups(grad_scores_ptr, position_C, valid_C, head, num_heads, dim_C, CHUNK, GROUPS)
    b_grad_scores = tl.where(run_C[:, None] == run_C[None, :], b_grad_scores, 0.0)
    # A row's score with itself has no decay, so it is kept out of the gradient of g.
    own_C = tl.sum(tl.where(pairs_inside(CHUNK, 1), b_grad_scores, 0.0), 1)
    b_met = tl.where(pairs_inside(CHUNK, 1), 0.0, b_grad_scores)
    b_q = load_rows(q_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32) * SCALE
    b_k = load_rows(k_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32)
    b_g = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C, end, head, num_heads, dim_K, K)
    b_next = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C + 1, end, head, num_heads, dim_K, K)
    b_sum = sum_from_start(b_g, CHUNK)
    if STEEP:
        b_grad_q, b_grad_k = _steep(b_q, b_k, b_g, b_next, b_met, dtype, CHUNK, MILD, PRECISION)
    else:
        b_grad_q, b_grad_k = met_inside(b_q, b_k, b_sum, b_met, dtype, PRECISION)
    # The score of rows s < t holds exp(g_{s + 1} + ... + g_t), so its share of g_j's gradient counts where s < j <= t.
    # Summed over all rows from j on, q dq adds the pairs with t >= j, and k dk takes away those with s >= j.
    b_crossing = b_q * b_grad_q - b_k * b_grad_k

    b_inter = _load_groups(grad_query_ptr, position_C, valid_C, head, num_heads, dim_K, K, GROUPS) * tl.exp(b_sum)
    b_inter = tl.where((run_C == before)[:, None], b_inter, 0.0)
    b_crossing += b_q * b_inter
    # Stored are gradients of the plain q and k: SCALE is part of q here.
    b_grad_q += own_C[:, None] * b_k + b_inter
    store_rows(grad_q_ptr, row_C, valid_C, head, num_heads, dim_K, K, b_grad_q * SCALE)
    b_inter = _load_groups(grad_key_ptr, position_C, valid_C, head, num_heads, dim_K, K, GROUPS)
    b_inter = tl.where((run_C == last)[:, None], b_inter * tl.exp(sum_to_end(b_next, CHUNK)), 0.0)
    b_grad_k += own_C[:, None] * b_q + b_inter
    store_rows(grad_k_ptr, row_C, valid_C, head, num_heads, dim_K, K, b_grad_k)

    # Rows up to j - 1 reach the leaving state through g_j: an exclusive sum from the chunk's start.
    b_leaving = b_k * b_inter
    next_C = tl.load(run_ptr + position_C + 1, mask=position_C + 1 < end, other=-1)
    b_grad_g = sum_later(b_crossing, run_C != next_C) + tl.cumsum(b_leaving, 0) - b_leaving
    through_K = tl.zeros([BLOCK_K], tl.float32)
    for group in tl.static_range(GROUPS):
        offset_K = ((chunk.to(tl.int64) * num_heads + head) * GROUPS + group) * K + dim_K
        through_K += tl.load(through_ptr + offset_K, mask=dim_K < K, other=0.0)
    b_grad_g = (b_grad_g + through_K[None, :]) * writes_C[:, None]
    store_rows(grad_g_ptr, row_C, valid_C, head, num_heads, dim_K, K, b_grad_g)


@triton.jit
def _load_groups(ptr, row_C, valid_C, head, heads, dim_c, DIM: tl.constexpr, GROUPS: tl.constexpr):
    """Load rows and sum them over the value heads of a key head, in fp32."""
    b_sum = load_rows(ptr, row_C, valid_C, head * GROUPS, heads * GROUPS, dim_c, DIM).to(tl.float32)
    for group in tl.static_range(1, GROUPS):
        b_sum += load_rows(ptr, row_C, valid_C, head * GROUPS + group, heads * GROUPS, dim_c, DIM).to(tl.float32)
    return b_sum


@triton.jit
def met_inside(b_q, b_k, b_sum, b_met, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return the gradients of q and k from scores whose decays are quotients of exp(b_sum)."""
    b_shrunk, b_grown = tl.exp(b_sum), tl.exp(-b_sum)
    b_met = b_met.to(dtype)
    b_grad_q = tl.dot(b_met, (b_k * b_grown).to(dtype), input_precision=PRECISION) * b_shrunk
    b_grad_k = tl.dot(tl.trans(b_met), (b_q * b_shrunk).to(dtype), input_precision=PRECISION) * b_grown
    return b_grad_q, b_grad_k


@triton.jit
def _steep(
    b_q, b_k, b_g, b_next, b_met, dtype: tl.constexpr, C: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the gradients of q and k of a steep chunk, halved into blocks as in gla_steep."""
    b_grad_q, b_grad_k = tl.zeros([C, b_q.shape[1]], tl.float32), tl.zeros([C, b_q.shape[1]], tl.float32)
    for level in tl.static_range(2):
        b_gq, b_gk = met_across(b_q, b_k, b_g, b_next, b_met, dtype, C, 32 >> level, PRECISION)
        b_grad_q, b_grad_k = b_grad_q + b_gq, b_grad_k + b_gk
    b_sum = sum_from_start(b_g, 16)
    if tl.min(b_sum) >= -MILD:
        b_gq, b_gk = met_inside(b_q, b_k, b_sum, tl.where(pairs_inside(C, 16), b_met, 0.0), dtype, PRECISION)
        b_grad_q, b_grad_k = b_grad_q + b_gq, b_grad_k + b_gk
    else:
        for level in tl.static_range(4):
            b_gq, b_gk = met_across(b_q, b_k, b_g, b_next, b_met, dtype, C, 8 >> level, PRECISION)
            b_grad_q, b_grad_k = b_grad_q + b_gq, b_grad_k + b_gk
    return b_grad_q, b_grad_k


@triton.jit
def met_across(
    b_q, b_k, b_g, b_next, b_met, dtype: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the gradients of q and k from the scores of each later half of 2 HALF rows with its earlier half."""
    b_late, b_early = tl.exp(sum_from_start(b_g, HALF)), tl.exp(sum_to_end(b_next, HALF))
    b_met = tl.where(pairs_across(C, HALF), b_met, 0.0).to(dtype)
    b_grad_q = tl.dot(b_met, (b_k * b_early).to(dtype), input_precision=PRECISION) * b_late
    b_grad_k = tl.dot(tl.trans(b_met), (b_q * b_late).to(dtype), input_precision=PRECISION) * b_early
    return b_grad_q, b_grad_k
