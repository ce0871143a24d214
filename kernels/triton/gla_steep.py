"""Scores inside steep chunks: those that forget too much for a product of growing and shrinking factors.

Scores between two neighbouring blocks are products of q decayed from the border between them and k decayed to it, so
that no factor exceeds 1. The chunk of 64 rows is halved (32 and 32, then 16 and 16); below 16 rows, halving continues
only where a block of 16 is steep itself. This is exact for any decay, slower, and rare in training.
"""

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
    sum_to_end,
)


@triton.jit(do_not_specialize=["num_tokens"])
def gla_steep_scores_kernel(
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
    scores_ptr,
    num_tokens,
    num_heads,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the scores [.., H, C] by position of a steep chunk of one key head; other chunks return at once."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if end <= start:
        return
    if tl.load(steep_ptr + chunk * num_heads + head) == 0:
        return
    q_ptr, k_ptr, g_ptr = q1_ptr, k1_ptr, g1_ptr
    if start >= num_tokens:
        q_ptr, k_ptr, g_ptr = q2_ptr, k2_ptr, g2_ptr
    position_C = start + tl.arange(0, CHUNK)
    valid_C = position_C < end
    token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
    run_C, _, _ = load_runs(run_ptr, start, end, CHUNK)
    dtype = scores_ptr.dtype.element_ty

    b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in range(0, K, BLOCK_K):
        dim_K = first + tl.arange(0, BLOCK_K)
        b_q = load_rows(q_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32) * SCALE
        b_k = load_rows(k_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32)
        b_g = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C, end, head, num_heads, dim_K, K)
        b_next = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C + 1, end, head, num_heads, dim_K, K)
        for level in tl.static_range(2):
            b_scores += scores_across(b_q, b_k, b_g, b_next, dtype, CHUNK, 32 >> level, PRECISION)
        # Blocks of 16 rows that are mild: q exp(sum) times k exp(-sum), as in chunks that are not steep.
        b_sum = sum_from_start(b_g, 16)
        if tl.min(b_sum) >= -MILD:
            b_block = product(b_q * tl.exp(b_sum), b_k * tl.exp(-b_sum), dtype, PRECISION)
            b_scores += tl.where(pairs_inside(CHUNK, 16), b_block, 0.0)
        else:
            for level in tl.static_range(4):
                b_scores += scores_across(b_q, b_k, b_g, b_next, dtype, CHUNK, 8 >> level, PRECISION)
            # A row meets itself without decay.
            b_scores += tl.where(pairs_inside(CHUNK, 1), tl.sum(b_q * b_k, 1)[:, None], 0.0)
    b_scores = tl.where(run_C[:, None] == run_C[None, :], b_scores, 0.0)
    store_rows(scores_ptr, position_C, valid_C, head, num_heads, tl.arange(0, CHUNK), CHUNK, b_scores)


@triton.jit
def product(b_q, b_k, dtype: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(b_q.to(dtype), tl.trans(b_k.to(dtype)), input_precision=PRECISION)


@triton.jit
def scores_across(
    b_q, b_k, b_g, b_next, dtype: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the scores of the rows in the later half of each block of 2 HALF rows with those in the earlier half."""
    b_late, b_early = b_q * tl.exp(sum_from_start(b_g, HALF)), b_k * tl.exp(sum_to_end(b_next, HALF))
    return tl.where(pairs_across(C, HALF), product(b_late, b_early, dtype, PRECISION), 0.0)
