"""What the kernels of gated linear attention share: rows in and out of memory, and sums of log decays inside blocks.

A program holds a chunk's tile [C, K]. Only sums of a block's own log decays are exponentiated, never differences.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, row_C, valid_C, head, heads, dim_D, DIM: tl.constexpr):
    """Rows [C, D] of a tensor [..., heads, DIM], zeros where there is none."""
    offset_CD = (row_C.to(tl.int64) * heads + head)[:, None] * DIM + dim_D[None, :]
    return tl.load(ptr + offset_CD, mask=valid_C[:, None] & (dim_D < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, row_C, valid_C, head, heads, dim_D, DIM: tl.constexpr, b_x):
    """The other way round, in the tensor's dtype."""
    offset_CD = (row_C.to(tl.int64) * heads + head)[:, None] * DIM + dim_D[None, :]
    tl.store(ptr + offset_CD, b_x.to(ptr.dtype.element_ty), mask=valid_C[:, None] & (dim_D < DIM)[None, :])


@triton.jit
def state_offsets(index, head, heads, dim_K, dim_V, K: tl.constexpr, V: tl.constexpr):
    """Offsets and mask [BLOCK_K, BLOCK_V] of a tile in states [..., heads, K, V]."""
    offset_KV = (index.to(tl.int64) * heads + head) * K * V + dim_K[:, None] * V + dim_V[None, :]
    return offset_KV, (dim_K < K)[:, None] & (dim_V < V)[None, :]


@triton.jit
def load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C, end, head, heads, dim_K, K: tl.constexpr):
    """Log decays [C, K] in fp32 of the rows at these positions, zero where a row does not write or there is none."""
    valid_C = position_C < end
    token_C = tl.load(token_ptr + position_C, mask=valid_C, other=0)
    writes_C = tl.load(writes_ptr + tl.load(row_ptr + position_C, mask=valid_C, other=0), mask=valid_C, other=0.0)
    return load_rows(g_ptr, token_C, valid_C, head, heads, dim_K, K) * writes_C[:, None]


@triton.jit
def sum_from_start(b_g, SIZE: tl.constexpr):
    """Sums [C, K] over the rows from the start of each block of SIZE rows to the row itself."""
    C: tl.constexpr = b_g.shape[0]
    K: tl.constexpr = b_g.shape[1]
    if SIZE == C:
        return tl.cumsum(b_g, 0)
    if SIZE == 1:
        return b_g
    return tl.reshape(tl.cumsum(tl.reshape(b_g, [C // SIZE, SIZE, K]), 1), [C, K])


@triton.jit
def sum_to_end(b_next, SIZE: tl.constexpr):
    """Sums [C, K] over the rows after each row to the end of its block; `b_next` is moved up by one row, so that what
    a row itself holds never enters its sum."""
    C: tl.constexpr = b_next.shape[0]
    K: tl.constexpr = b_next.shape[1]
    if SIZE == C:
        return tl.cumsum(b_next, 0, reverse=True)
    if SIZE == 1:
        return tl.zeros([C, K], tl.float32)
    last_C1 = (tl.arange(0, C) % SIZE == SIZE - 1)[:, None]
    b_inside = tl.where(last_C1, 0.0, b_next)
    return tl.reshape(tl.cumsum(tl.reshape(b_inside, [C // SIZE, SIZE, K]), 1, reverse=True), [C, K])


@triton.jit
def pairs_across(C: tl.constexpr, HALF: tl.constexpr):
    """Mask [C, C]: the row stands in the later half of a block of 2 HALF rows, the column in the earlier one."""
    row_C1, column_1C = tl.arange(0, C)[:, None] // HALF, tl.arange(0, C)[None, :] // HALF
    return (row_C1 % 2 == 1) & (column_1C == row_C1 - 1)


@triton.jit
def pairs_inside(C: tl.constexpr, SIZE: tl.constexpr):
    """Mask [C, C]: the column stands before the row, or at it, in the same block of SIZE rows."""
    row_C1, column_1C = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (row_C1 // SIZE == column_1C // SIZE) & (column_1C <= row_C1)
