"""Helpers of the kernels of gated linear attention: loading and storing rows, and sums of log decays inside blocks.

A program holds a chunk's tile [C, K]. Every sum of log decays is added up on its own and then exponentiated: the
difference of two long sums would lose the digits of a short one.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, row_C, valid_C, head, heads, dim_c, DIM: tl.constexpr):
    """Load rows [C, c] of a tensor [..., heads, DIM], with zeros for rows that are not valid."""
    # int64: rows x heads x channels passes 2^31 elements at long lengths.
    offset_Cc = (row_C.to(tl.int64) * heads + head)[:, None] * DIM + dim_c[None, :]
    return tl.load(ptr + offset_Cc, mask=valid_C[:, None] & (dim_c < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, row_C, valid_C, head, heads, dim_c, DIM: tl.constexpr, b_x):
    """Store rows [C, c] to a tensor [..., heads, DIM], in its dtype."""
    offset_Cc = (row_C.to(tl.int64) * heads + head)[:, None] * DIM + dim_c[None, :]
    tl.store(ptr + offset_Cc, b_x.to(ptr.dtype.element_ty), mask=valid_C[:, None] & (dim_c < DIM)[None, :])


@triton.jit
def state_offsets(index, head, heads, dim_K, dim_V, K: tl.constexpr, V: tl.constexpr):
    """Return offsets and mask [BLOCK_K, BLOCK_V] of a tile of states [..., heads, K, V]."""
    offset_KV = (index.to(tl.int64) * heads + head) * K * V + dim_K[:, None] * V + dim_V[None, :]
    return offset_KV, (dim_K < K)[:, None] & (dim_V < V)[None, :]


@triton.jit
def load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C, end, head, heads, dim_K, K: tl.constexpr):
    """Load the log decays [C, K] of the rows at these positions, in fp32.

    They are zero (no decay) where a row does not write, and at positions from `end` on.
    """
    valid_C = position_C < end
    token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
    # Whether a row writes is known by row, its log decay by token: the picks of a token share it.
    writes_C = tl.load(writes_ptr + tl.load(row_ptr + position_C, mask=valid_C, other=0), mask=valid_C, other=0.0)
    # Selected, not multiplied: a log decay may be -inf.
    return tl.where(writes_C[:, None] > 0, load_rows(g_ptr, token_C, token_C >= 0, head, heads, dim_K, K), 0.0)


@triton.jit
def load_runs(run_ptr, start, end, C: tl.constexpr):
    """Load the runs (see triton_rows.Rows) of the rows start .. end - 1 of a chunk or piece, at most C of them.

    Returns the rows' runs [C], the run before the first row, and that of the last row. Rows of the run before see the
    state that enters, rows of the last run reach the one that leaves; where the two differ nothing passes through.
    Run 0 is before the first row of all, and before and behind an empty piece.
    """
    position_C = start + tl.arange(0, C)
    run_C = tl.load(run_ptr + position_C, mask=position_C < end, other=-1)
    before = tl.load(run_ptr + start - 1, mask=(start > 0) & (start < end), other=0)
    last = tl.load(run_ptr + end - 1, mask=start < end, other=0)
    return run_C, before, last


@triton.jit
def sum_from_start(b_g, SIZE: tl.constexpr):
    """Return sums [C, K] over the rows from the start of each block of SIZE rows to the row itself.

    Rows a b c d with SIZE 2: a, a + b, c, c + d.
    """
    C: tl.constexpr = b_g.shape[0]
    K: tl.constexpr = b_g.shape[1]
    if SIZE == C:
        return tl.cumsum(b_g, 0)
    if SIZE == 1:
        return b_g
    return tl.reshape(tl.cumsum(tl.reshape(b_g, [C // SIZE, SIZE, K]), 1), [C, K])


@triton.jit
def sum_to_end(b_next, SIZE: tl.constexpr):
    """Return sums [C, K] over the rows after each row to the end of its block of SIZE rows.

    `b_next` holds the rows moved up by one, so that a row's own value never enters its sum: rows a b c d with SIZE 2
    come as b c d 0 and give b, 0, d, 0.
    """
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
def _join_sums(first, first_ends, second, second_ends):
    """Join the sums of two neighbouring stretches of rows; `ends` says whether a run ends inside a stretch."""
    return tl.where(second_ends > 0, second, first + second), first_ends | second_ends


@triton.jit
def sum_later(b_x, last_C):
    """Return, for each row, the sum [C, K] over the rows of its run from it to the run's end.

    last_C: whether the row is the last of its run. A difference of two sums over the chunk would leave rounding of
    other documents.
    """
    b_ends = tl.broadcast_to(last_C.to(tl.int32)[:, None], b_x.shape)
    b_sum, _ = tl.associative_scan((b_x, b_ends), 0, _join_sums, reverse=True)
    return b_sum


@triton.jit
def pairs_across(C: tl.constexpr, HALF: tl.constexpr):
    """Return a mask [C, C]: the row is in the later half of a block of 2 HALF rows, the column in its earlier half."""
    row_C1, column_1C = tl.arange(0, C)[:, None] // HALF, tl.arange(0, C)[None, :] // HALF
    return (row_C1 % 2 == 1) & (column_1C == row_C1 - 1)


@triton.jit
def pairs_inside(C: tl.constexpr, SIZE: tl.constexpr):
    """Return a mask [C, C]: row and column are in the same block of SIZE rows, and the column is not after the row."""
    row_C1, column_1C = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (row_C1 // SIZE == column_1C // SIZE) & (column_1C <= row_C1)
