"""The gated delta rule, forward: what a chunk's tokens write, and how pieces hand states on.

Inside a chunk of C rows that the state S enters, with F the decay from the chunk's start to a row, E from a row to the
chunk's end, and P between two rows: what is written is d = inverse @ (beta (write v - F (k S))), with
inverse = (1 + tril(beta k k^T P, -1))^-1. Then o = read (F q S / sqrt(K) + scores @ d) with
scores = tril(q k^T P) / sqrt(K), and S <- F_last S + (E k)^T d.
Every decay is the exponential of its own sum of log decays, and zero where a document starts in between. `gates` holds
g, beta, F and E in sorted order.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(row_ptr, token_ptr, place, valid):
    """Load the rows and tokens at the sorted positions `place`, int64, and whether the rows are read: not as zeros."""
    row = tl.load(row_ptr + place, mask=valid, other=0).to(tl.int64)
    token = tl.load(token_ptr + place, mask=valid, other=-1).to(tl.int64)
    return row, token, token >= 0


@triton.jit
def load_runs(run_ptr, start, end, C: tl.constexpr):
    """Load the runs (see triton_rows.Rows) of a chunk's rows [C], the run before the first row, and the last row's.

    Rows of the run before see the state that enters the chunk, and those of the last run reach the one that leaves it.
    """
    place = start + tl.arange(0, C)
    run = tl.load(run_ptr + place, mask=place < end, other=-1)
    before = tl.load(run_ptr + start - 1, mask=start > 0, other=0)
    return run, before, tl.load(run_ptr + end - 1)


@triton.jit
def load_starts(run_ptr, place, valid):
    """Load whether a document starts at the rows at the sorted positions `place`."""
    run = tl.load(run_ptr + place, mask=valid, other=0)
    return run != tl.load(run_ptr + place - 1, mask=valid & (place > 0), other=0)


@triton.jit
def tile_mask(valid, column, SIZE: tl.constexpr):
    """Return the mask of valid rows and columns below SIZE; no test of columns where blocks fill SIZE exactly."""
    if SIZE // column.shape[0] * column.shape[0] == SIZE:
        return valid[:, None]
    else:
        return valid[:, None] & (column < SIZE)[None, :]


@triton.jit
def load_tile(ptr, index, valid, column, SIZE: tl.constexpr):
    """Load the columns `column` of the rows `index` of a matrix of SIZE columns, with zeros outside the mask."""
    mask = tile_mask(valid, column, SIZE)
    return tl.load(ptr + (index[:, None] * SIZE + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, index, valid, column, x, SIZE: tl.constexpr):
    """Store the columns `column` of the rows `index` of a matrix of SIZE columns, in its dtype."""
    mask = tile_mask(valid, column, SIZE)
    tl.store(ptr + (index[:, None] * SIZE + column[None, :]), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(gates_ptr, which: tl.constexpr, head, first, row, valid, num_rows, HV: tl.constexpr):
    """Load from a tensor [.., HV, R] the vector `which` of a head, at the positions first + row.

    In `gates`, `which` is 0 for g, 1 for beta, 2 for the decay from the chunk's start and 3 for that to its end.
    """
    base = gates_ptr + ((which * HV + head).to(tl.int64) * num_rows + first)
    return tl.load(base + row, mask=valid, other=0.0)


@triton.jit
def store_gate(gates_ptr, which: tl.constexpr, head, first, row, valid, x, num_rows, HV: tl.constexpr):
    """Store to a tensor [.., HV, R] the vector `which` of a head, at the positions first + row."""
    base = gates_ptr + ((which * HV + head).to(tl.int64) * num_rows + first)
    tl.store(base + row, x, mask=valid)


@triton.jit
def pair_decay(g, run, C: tl.constexpr):
    """Return exp(g_{s + 1} + ... + g_t) for s <= t of one run and zero elsewhere, [C, C].

    Each sum is added up on its own.
    """
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    sums = tl.cumsum(tl.where(t > s, g[:, None], 0.0), axis=0)
    return tl.where((t >= s) & (run[:, None] == run[None, :]), tl.exp(sums), 0.0)


@triton.jit
def split_lower(x, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Split COUNT lower block triangular matrices of 2 SIZE rows into the diagonal blocks, 2 COUNT, and those below."""
    # Only the last dim of size 2 can be split, so the halves of rows and of columns are moved there in turn.
    top, bottom = tl.split(tl.permute(tl.reshape(x, (COUNT, 2, SIZE, 2, SIZE)), (0, 2, 4, 3, 1)))
    early, _ = tl.split(top)
    below, late = tl.split(bottom)
    return tl.reshape(tl.permute(tl.join(early, late), (0, 3, 1, 2)), (2 * COUNT, SIZE, SIZE)), below


@triton.jit
def join_lower(diagonal, below, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Return the inverses of the matrices that split_lower split, given those of the diagonal blocks.

    The inverse of [[early, 0], [below, late]] is [[early^-1, 0], [-late^-1 below early^-1, late^-1]].
    """
    early, late = tl.split(tl.permute(tl.reshape(diagonal, (COUNT, 2, SIZE, SIZE)), (0, 2, 3, 1)))
    if COUNT == 1:
        early, below = tl.reshape(early, (SIZE, SIZE)), tl.reshape(below, (SIZE, SIZE))
        late = tl.reshape(late, (SIZE, SIZE))
    below = -tl.dot(late, tl.dot(below, early, input_precision="ieee"), input_precision="ieee")
    rows = tl.join(tl.join(early, tl.zeros_like(early)), tl.join(below, late))
    rows = tl.permute(tl.reshape(rows, (COUNT, SIZE, SIZE, 2, 2)), (0, 4, 1, 3, 2))
    return tl.reshape(rows, (COUNT, 2 * SIZE, 2 * SIZE))


@triton.jit
def invert_64(lower):
    """Return (1 + lower)^-1 of a strictly lower triangular [64, 64].

    Inverses of diagonal blocks of 1, 2, 4 .. 32 rows are joined in pairs, which is stable, unlike a series of powers of
    `lower`. Up to 16 rows the blocks stay inside four [16, 16] matrices, since tl.dot takes no smaller ones.
    """
    halves, below_32 = split_lower(tl.reshape(lower, (1, 64, 64)), 1, 32)
    quarters, below_16 = split_lower(halves, 2, 16)
    t, s = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    # Blocks of 2 rows: the inverse of [[1, 0], [x, 1]] is [[1, 0], [-x, 1]].
    inverse = tl.where(t == s, 1.0, tl.where(t // 2 == s // 2, -quarters, 0.0))
    for half in tl.static_range(1, 4):
        # What pairs neighbouring blocks of 2^half rows: for half 1, the rows 2 3 with the columns 0 1.
        below = tl.where((t >> half != s >> half) & (t >> (half + 1) == s >> (half + 1)), quarters, 0.0)
        inverse -= tl.dot(inverse, tl.dot(below, inverse, input_precision="ieee"), input_precision="ieee")
    inverse = join_lower(join_lower(inverse, below_16, 2, 16), below_32, 1, 32)
    return tl.reshape(inverse, (64, 64))


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_gates_kernel(
    g1_ptr,
    beta1_ptr,
    g2_ptr,
    beta2_ptr,
    writes_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    gates_ptr,
    num_tokens,
    num_rows,
    HV: tl.constexpr,
    BH: tl.constexpr,
    C: tl.constexpr,
):
    """Compute a chunk's gates of all heads, in sorted order (see load_gate); program (chunk)."""
    start, end = tl.load(chunk_start_ptr + tl.program_id(0)), tl.load(chunk_end_ptr + tl.program_id(0))
    if start >= end:
        return
    # Sorted positions from num_tokens on are picks: they use the partitions' tensors.
    if start >= num_tokens:
        g1_ptr, beta1_ptr = g2_ptr, beta2_ptr
    place, head = start + tl.arange(0, C), tl.arange(0, BH)
    row, token, is_read = load_rows(row_ptr, token_ptr, place, place < end)
    writes = tl.load(writes_ptr + row, mask=place < end, other=0.0)[:, None]
    # Selected, not multiplied: a log decay may be -inf. What resets do is masked by the runs, so that they have none.
    decaying = (writes > 0) & ~load_starts(run_ptr, place, place < end)[:, None]
    g = tl.where(decaying, load_tile(g1_ptr, token, is_read, head, HV), 0.0)
    beta = load_tile(beta1_ptr, token, is_read, head, HV) * writes
    # The decay to the chunk's end sums the rows after each row: the same loads, one position further.
    row, token, is_read = load_rows(row_ptr, token_ptr, place + 1, place + 1 < end)
    writes = tl.load(writes_ptr + row, mask=place + 1 < end, other=0.0)[:, None]
    decaying = (writes > 0) & ~load_starts(run_ptr, place + 1, place + 1 < end)[:, None]
    later_g = tl.where(decaying, load_tile(g1_ptr, token, is_read, head, HV), 0.0)
    run, before, last = load_runs(run_ptr, start, end, C)
    from_start = tl.where((run == before)[:, None], tl.exp(tl.cumsum(g, axis=0)), 0.0)
    to_end = tl.where((run == last)[:, None], tl.exp(tl.cumsum(later_g, axis=0, reverse=True)), 0.0)

    # `gates` is [4, HV, R]: for one head, neighbouring positions are neighbours in memory.
    matrix = num_rows.to(tl.int64) * HV
    offset = head.to(tl.int64)[None, :] * num_rows + place[:, None]
    mask = (place < end)[:, None] & (head < HV)[None, :]
    tl.store(gates_ptr + offset, g, mask=mask)
    tl.store(gates_ptr + matrix + offset, beta, mask=mask)
    tl.store(gates_ptr + 2 * matrix + offset, from_start, mask=mask)
    tl.store(gates_ptr + 3 * matrix + offset, to_end, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_prepare_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    gates_ptr,
    inverse_ptr,
    scores_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the inverse and the scores of a chunk; program (chunk, value head)."""
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = inverse_ptr.dtype.element_ty
    if start >= num_tokens:
        q1_ptr, k1_ptr = q2_ptr, k2_ptr
    within = tl.arange(0, C)
    valid = start + within < end
    token = tl.load(token_ptr + start + within, mask=valid, other=-1).to(tl.int64)
    is_read = token >= 0
    # Neighbouring value heads share a key head.
    key_row = token * H + head // (HV // H)
    met = tl.zeros((C, C), dtype=tl.float32)
    scores = tl.zeros((C, C), dtype=tl.float32)
    for first in tl.range(0, K, BK):
        column = first + tl.arange(0, BK)
        q = load_tile(q1_ptr, key_row, is_read, column, K).to(dtype)
        k = load_tile(k1_ptr, key_row, is_read, column, K).to(dtype)
        met = tl.dot(k, tl.trans(k), met, input_precision="ieee")
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    run, _, _ = load_runs(run_ptr, start, end, C)
    decay = pair_decay(load_gate(gates_ptr, 0, head, start, within, valid, num_rows, HV), run, C)
    tile = (head.to(tl.int64) * num_rows + start) * C
    store_tile(scores_ptr + tile, within, valid, within, scores * decay * SCALE, C)
    beta = load_gate(gates_ptr, 1, head, start, within, valid, num_rows, HV)
    # Rows that are not valid were loaded as zeros, so they do not enter the inverse of the others.
    lower = tl.where(within[:, None] > within[None, :], beta[:, None] * met * decay, 0.0)
    store_tile(inverse_ptr + tile, within, valid, within, invert_64(lower), C)


@triton.jit
def write_chunk(state, k, v, inverse, beta, from_start):
    """Return what a chunk writes into the entering state: d [C, V], fp32."""
    recalled = tl.dot(k, state.to(k.dtype), input_precision="ieee")
    change = beta[:, None] * (v - from_start[:, None] * recalled)
    return tl.dot(inverse, change.to(k.dtype), input_precision="ieee")


@triton.jit
def hand_on(state, k, d, to_end, decay):
    """Return the state that leaves the chunk."""
    kept = (to_end[:, None] * d).to(k.dtype)
    return tl.dot(tl.trans(k), kept, decay * state, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_summarize_kernel(
    k1_ptr,
    k2_ptr,
    v_ptr,
    write_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    inverse_ptr,
    gates_ptr,
    transition_ptr,
    increment_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    """Compute columns of a piece's increment or of its transition; program (piece, value head, block of columns).

    The transition is found like the increment, with a state that starts as the identity and values of zero. An empty
    piece gets the identity and no increment.
    """
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    blocks: tl.constexpr = value_blocks + (K + BV - 1) // BV
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    piece = tl.program_id(0) // (blocks * HV)
    start, end = tl.load(piece_start_ptr + piece).to(tl.int32), tl.load(piece_end_ptr + piece).to(tl.int32)
    dtype = inverse_ptr.dtype.element_ty
    if start >= num_tokens:
        k1_ptr = k2_ptr
    is_increment = block < value_blocks
    within, key, matrix = tl.arange(0, C), tl.arange(0, BK), (piece * HV + head).to(tl.int64)
    column = (block if is_increment else block - value_blocks) * BV + tl.arange(0, BV)
    # Blocks from value_blocks on are columns of the transition: their state starts as columns of the identity.
    state = tl.where((key[:, None] == column[None, :]) & (block >= value_blocks), 1.0, 0.0)
    for first in range(start, end, C):
        place = first + within
        valid = place < end
        row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
        sorted_row = head.to(tl.int64) * num_rows + first
        k = load_tile(k1_ptr, token * H + head // (HV // H), is_read, key, K).to(dtype)
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        beta = load_gate(gates_ptr, 1, head, first, within, valid, num_rows, HV)
        from_start = load_gate(gates_ptr, 2, head, first, within, valid, num_rows, HV)
        to_end = load_gate(gates_ptr, 3, head, first, within, valid, num_rows, HV)
        # The full chunk's decay is that from its start to its last row, at position min(first + C, end) - 1.
        decay = load_gate(gates_ptr, 2, head, tl.minimum(first + C, end), -1, True, num_rows, HV)
        v = load_tile(v_ptr, token * HV + head, is_read & is_increment, column, V).to(tl.float32)
        v *= tl.load(write_ptr + row, mask=valid, other=0.0)[:, None]
        d = write_chunk(state, k, v, inverse, beta, from_start)
        state = hand_on(state, k, d, to_end, decay)
    if is_increment:
        store_tile(increment_ptr + matrix * K * V, key, key < K, column, state, V)
    else:
        store_tile(transition_ptr + matrix * K * K, key, key < K, column, state, K)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_attend_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    v_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    inverse_ptr,
    scores_ptr,
    gates_ptr,
    entering_ptr,
    o_ptr,
    states_ptr,
    d_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    STORE: tl.constexpr,
    C: tl.constexpr,
):
    """Compute a piece's outputs from the state that enters it; program (piece, value head, block of V).

    Where STORE (in backward), it computes no outputs but stores the state that enters each chunk, and what the chunk
    writes in sorted order.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    piece = tl.program_id(0) // (blocks * HV)
    start, end = tl.load(piece_start_ptr + piece).to(tl.int32), tl.load(piece_end_ptr + piece).to(tl.int32)
    if start >= end:
        return
    dtype = inverse_ptr.dtype.element_ty
    if start >= num_tokens:
        q1_ptr, k1_ptr = q2_ptr, k2_ptr
    within, key, column = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = load_tile(entering_ptr + (piece * HV + head).to(tl.int64) * K * V, key, key < K, column, V)
    chunk = tl.load(chunk_ptr + piece).to(tl.int64)
    for first in range(start, end, C):
        place = first + within
        valid = place < end
        row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
        # inverse, scores, d and the gates are stored by head and then by sorted position.
        sorted_row = head.to(tl.int64) * num_rows + first
        key_row = token * H + head // (HV // H)
        k = load_tile(k1_ptr, key_row, is_read, key, K).to(dtype)
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        beta = load_gate(gates_ptr, 1, head, first, within, valid, num_rows, HV)
        from_start = load_gate(gates_ptr, 2, head, first, within, valid, num_rows, HV)
        to_end = load_gate(gates_ptr, 3, head, first, within, valid, num_rows, HV)
        decay = load_gate(gates_ptr, 2, head, tl.minimum(first + C, end), -1, True, num_rows, HV)
        v = load_tile(v_ptr, token * HV + head, is_read, column, V).to(tl.float32)
        v *= tl.load(write_ptr + row, mask=valid, other=0.0)[:, None]
        d = write_chunk(state, k, v, inverse, beta, from_start)
        if STORE:
            store_tile(states_ptr + (chunk * HV + head) * K * V, key, key < K, column, state, V)
            store_tile(d_ptr + sorted_row * V, within, valid, column, d, V)
            chunk += 1
        else:
            q = load_tile(q1_ptr, key_row, is_read, key, K).to(dtype)
            scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C)
            o = (SCALE * from_start)[:, None] * tl.dot(q, state.to(dtype), input_precision="ieee")
            o = tl.dot(scores, d.to(dtype), o, input_precision="ieee")
            o *= tl.load(read_ptr + row, mask=valid, other=0.0)[:, None]
            store_tile(o_ptr, row * HV + head, valid, column, o, V)
        state = hand_on(state, k, d, to_end, decay)
