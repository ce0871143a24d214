"""The delta rule with a decay per key channel (Kimi Delta Attention), forward.

Inside a chunk of C rows that the state S enters, with F_t the decays from the chunk's start to row t and E_t those from
row t to the chunk's end, per channel, and P_ts those between two rows: what is written is
d = inverse @ (beta (write v - (F k) S)), with inverse = (1 + tril(beta met, -1))^-1 and met_ts = sum k_t P_ts k_s.
Then o = read ((F q) S / sqrt(K) + scores @ d) with scores_ts = sum q_t P_ts k_s / sqrt(K) for s <= t, and
S <- F_last S + (E k)^T d. `prepare` stores F q / sqrt(K) (reading), F k (recalling), E k (keeping), scores, met,
inverse, F_last (decay) and beta, all but the decay in sorted order; pairs of rows of two documents are zero, and so is
whatever a reset keeps from the chunk's border.

Steep decays are common here, so P is never a quotient over a whole chunk: see pair_products.
"""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gdn_forward import (
    invert_64,
    load_gate,
    load_rows,
    load_runs,
    load_starts,
    load_tile,
    store_gate,
    store_tile,
)
from megatron_sse.kernels.triton.gla_steep import product, scores_across
from megatron_sse.kernels.triton.gla_tiles import pairs_inside, sum_from_start


@triton.jit
def load_decaying(writes_ptr, row_ptr, run_ptr, place, end):
    """Load which rows at the sorted positions `place` decay the state: those that write, and start no document."""
    valid = place < end
    row = tl.load(row_ptr + place, mask=valid, other=0)
    writes = tl.load(writes_ptr + row, mask=valid, other=0.0)
    return (writes > 0) & ~load_starts(run_ptr, place, valid)


@triton.jit
def load_decays(
    g_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place, end, head, key, HV: tl.constexpr, K: tl.constexpr
):
    """Load log decays [C, K] of rows at the sorted positions `place`; zeros for those that do not decay the state."""
    _, token, is_read = load_rows(row_ptr, token_ptr, place, place < end)
    g = load_tile(g_ptr, token * HV + head, is_read, key, K).to(tl.float32)
    # Selected, not multiplied: a log decay may be -inf.
    return tl.where(load_decaying(writes_ptr, row_ptr, run_ptr, place, end)[:, None], g, 0.0)


@triton.jit
def pair_products(x, k, g, next_g, dtype: tl.constexpr, C: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr):
    """Return sum_c x_t exp(g_{s + 1} + ... + g_t) k_s for the pairs s < t [C, C]; also s = t in mild blocks of 16 rows.

    Between halves of 64 and of 32 rows, x is decayed from the border between them and k to it, so that no factor
    exceeds 1. Blocks of 16 rows whose decays are mild (above exp(-MILD)) are x exp(sum) times k exp(-sum); others are
    halved further. next_g: g, moved up by one row.
    """
    found = tl.zeros((C, C), dtype=tl.float32)
    for level in tl.static_range(2):
        found += scores_across(x, k, g, next_g, dtype, C, 32 >> level, PRECISION)
    sums = sum_from_start(g, 16)
    if tl.min(sums) >= -MILD:
        inside = product(x * tl.exp(sums), k * tl.exp(-sums), dtype, PRECISION)
        found += tl.where(pairs_inside(C, 16), inside, 0.0)
    else:
        for level in tl.static_range(4):
            found += scores_across(x, k, g, next_g, dtype, C, 8 >> level, PRECISION)
        found += tl.where(pairs_inside(C, 1), tl.sum(x * k, axis=1)[:, None], 0.0)
    return found


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def kda_prepare_kernel(
    q1_ptr,
    k1_ptr,
    g1_ptr,
    beta1_ptr,
    q2_ptr,
    k2_ptr,
    g2_ptr,
    beta2_ptr,
    writes_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    reading_ptr,
    recalling_ptr,
    keeping_ptr,
    scores_ptr,
    met_ptr,
    inverse_ptr,
    decay_ptr,
    beta_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    SCALE: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """Compute what needs no state of a chunk; program (chunk, value head)."""
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = reading_ptr.dtype.element_ty
    # Sorted positions from num_tokens on are picks: they use the partitions' tensors.
    if start >= num_tokens:
        q1_ptr, k1_ptr, g1_ptr, beta1_ptr = q2_ptr, k2_ptr, g2_ptr, beta2_ptr
    within = tl.arange(0, C)
    place = start + within
    valid = place < end
    _, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    run, before, last = load_runs(run_ptr, start, end, C)
    sees, reaches = (run == before)[:, None], (run == last)[:, None]
    # Neighbouring value heads share a key head.
    key_row = token * H + head // (HV // H)
    sorted_row = head.to(tl.int64) * num_rows + start

    scores = tl.zeros((C, C), dtype=tl.float32)
    met = tl.zeros((C, C), dtype=tl.float32)
    for first in tl.range(0, K, BK):
        key = first + tl.arange(0, BK)
        g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place, end, head, key, HV, K)
        next_g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place + 1, end, head, key, HV, K)
        q = load_tile(q1_ptr, key_row, is_read, key, K).to(tl.float32) * SCALE
        k = load_tile(k1_ptr, key_row, is_read, key, K).to(tl.float32)
        from_start = tl.exp(tl.cumsum(g, axis=0))
        store_tile(reading_ptr + sorted_row * K, within, valid, key, tl.where(sees, q * from_start, 0.0), K)
        store_tile(recalling_ptr + sorted_row * K, within, valid, key, tl.where(sees, k * from_start, 0.0), K)
        kept = tl.where(reaches, k * tl.exp(tl.cumsum(next_g, axis=0, reverse=True)), 0.0)
        store_tile(keeping_ptr + sorted_row * K, within, valid, key, kept, K)
        decay = tl.where(before == last, tl.exp(tl.sum(g, axis=0)), 0.0)
        tl.store(decay_ptr + (chunk.to(tl.int64) * HV + head) * K + key, decay, mask=key < K)
        scores += pair_products(q, k, g, next_g, dtype, C, MILD, PRECISION)
        met += pair_products(k, k, g, next_g, dtype, C, MILD, PRECISION)

    # Loaded again: kept in registers through the loop, they would spill.
    row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    writes = tl.load(writes_ptr + row, mask=valid, other=0.0)
    beta = tl.load(beta1_ptr + token * HV + head, mask=is_read, other=0.0).to(tl.float32) * writes
    store_gate(beta_ptr, 0, head, start, within, valid, beta, num_rows, HV)
    run, _, _ = load_runs(run_ptr, start, end, C)
    same = run[:, None] == run[None, :]
    t, s = within[:, None], within[None, :]
    store_tile(scores_ptr + sorted_row * C, within, valid, within, tl.where(same & (t >= s), scores, 0.0), C)
    met = tl.where(same & (t > s), met, 0.0)
    store_tile(met_ptr + sorted_row * C, within, valid, within, met, C)
    # Rows that are not valid were loaded as zeros, so they do not enter the inverse of the others.
    store_tile(inverse_ptr + sorted_row * C, within, valid, within, invert_64(beta[:, None] * met), C)


@triton.jit
def load_decay(decay_ptr, chunk, head, key, HV: tl.constexpr, K: tl.constexpr):
    """Load a chunk's decay [K, 1]."""
    return tl.load(decay_ptr + (chunk * HV + head) * K + key, mask=key < K, other=0.0)[:, None]


@triton.jit
def write_chunk(state, recalling, v, inverse, beta, PRECISION: tl.constexpr):
    """Return what a chunk writes into the entering state: d [C, V], fp32."""
    recalled = tl.dot(recalling, state.to(recalling.dtype), input_precision=PRECISION)
    change = beta[:, None] * (v - recalled)
    return tl.dot(inverse, change.to(recalling.dtype), input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_rows"])
def kda_summarize_kernel(
    v_ptr,
    write_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    recalling_ptr,
    keeping_ptr,
    inverse_ptr,
    decay_ptr,
    beta_ptr,
    transition_ptr,
    increment_ptr,
    num_rows,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
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
    is_increment = block < value_blocks
    within, key, matrix = tl.arange(0, C), tl.arange(0, BK), (piece * HV + head).to(tl.int64)
    column = (block if is_increment else block - value_blocks) * BV + tl.arange(0, BV)
    # Blocks from value_blocks on are columns of the transition: their state starts as columns of the identity.
    state = tl.where((key[:, None] == column[None, :]) & (block >= value_blocks), 1.0, 0.0)
    chunk = tl.load(chunk_ptr + piece).to(tl.int64)
    for first in range(start, end, C):
        place = first + within
        valid = place < end
        row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
        sorted_row = head.to(tl.int64) * num_rows + first
        recalling = load_tile(recalling_ptr + sorted_row * K, within, valid, key, K)
        keeping = load_tile(keeping_ptr + sorted_row * K, within, valid, key, K)
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        beta = load_gate(beta_ptr, 0, head, first, within, valid, num_rows, HV)
        v = load_tile(v_ptr, token * HV + head, is_read & is_increment, column, V).to(tl.float32)
        v *= tl.load(write_ptr + row, mask=valid, other=0.0)[:, None]
        d = write_chunk(state, recalling, v, inverse, beta, PRECISION).to(recalling.dtype)
        decayed = load_decay(decay_ptr, chunk, head, key, HV, K) * state
        state = tl.dot(tl.trans(keeping), d, decayed, input_precision=PRECISION)
        chunk += 1
    if is_increment:
        store_tile(increment_ptr + matrix * K * V, key, key < K, column, state, V)
    else:
        store_tile(transition_ptr + matrix * K * K, key, key < K, column, state, K)


@triton.jit(do_not_specialize=["num_rows"])
def kda_attend_kernel(
    v_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    reading_ptr,
    recalling_ptr,
    keeping_ptr,
    scores_ptr,
    inverse_ptr,
    decay_ptr,
    beta_ptr,
    entering_ptr,
    o_ptr,
    states_ptr,
    d_ptr,
    num_rows,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
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
    within, key, column = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = load_tile(entering_ptr + (piece * HV + head).to(tl.int64) * K * V, key, key < K, column, V)
    chunk = tl.load(chunk_ptr + piece).to(tl.int64)
    for first in range(start, end, C):
        place = first + within
        valid = place < end
        row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
        sorted_row = head.to(tl.int64) * num_rows + first
        recalling = load_tile(recalling_ptr + sorted_row * K, within, valid, key, K)
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        beta = load_gate(beta_ptr, 0, head, first, within, valid, num_rows, HV)
        v = load_tile(v_ptr, token * HV + head, is_read, column, V).to(tl.float32)
        v *= tl.load(write_ptr + row, mask=valid, other=0.0)[:, None]
        d = write_chunk(state, recalling, v, inverse, beta, PRECISION).to(recalling.dtype)
        if STORE:
            store_tile(states_ptr + (chunk * HV + head) * K * V, key, key < K, column, state, V)
            store_tile(d_ptr + sorted_row * V, within, valid, column, d, V)
        else:
            reading = load_tile(reading_ptr + sorted_row * K, within, valid, key, K)
            scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C)
            o = tl.dot(reading, state.to(recalling.dtype), input_precision=PRECISION)
            o = tl.dot(scores, d, o, input_precision=PRECISION)
            o *= tl.load(read_ptr + row, mask=valid, other=0.0)[:, None]
            store_tile(o_ptr, row * HV + head, valid, column, o, V)
        keeping = load_tile(keeping_ptr + sorted_row * K, within, valid, key, K)
        decayed = load_decay(decay_ptr, chunk, head, key, HV, K) * state
        state = tl.dot(tl.trans(keeping), d, decayed, input_precision=PRECISION)
        chunk += 1
