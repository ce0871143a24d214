"""The delta rule with a decay per key channel, backward: gradients of the states, of what was prepared, of the inputs.

With the names of kda_forward.py, do the output's gradient times read, and dS the gradient of the state that leaves a
chunk: dd = scores^T do + (E k) dS is the gradient of what is written, dx = inverse^T dd that of
beta (write v - (F k) S), and dS <- F_last dS + (F q / sqrt(K))^T do - (beta F k)^T dx. As in gdn_backward.py, the
gradient of beta met is -dx d^T below the diagonal.
"""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gdn_forward import load_gate, load_rows, load_runs, load_tile, store_gate, store_tile
from megatron_sse.kernels.triton.gla_intra import met_across, met_inside
from megatron_sse.kernels.triton.gla_tiles import pairs_inside, sum_from_start, sum_later
from megatron_sse.kernels.triton.kda_forward import load_decay, load_decaying, load_decays


@triton.jit(do_not_specialize=["num_rows"])
def kda_states_backward_kernel(
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
    grad_o_ptr,
    grad_leaving_ptr,
    grad_entering_ptr,
    grad_states_ptr,
    grad_change_ptr,
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
    """Compute the gradient of the state that enters a piece, through its own outputs alone.

    Program (piece, value head, block of V). Where STORE, it starts instead from the gradient of the state that leaves
    the piece, and stores the gradient of the state that leaves each chunk, and dx in sorted order.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    piece = tl.program_id(0) // (blocks * HV)
    start, end = tl.load(piece_start_ptr + piece).to(tl.int32), tl.load(piece_end_ptr + piece).to(tl.int32)
    dtype = inverse_ptr.dtype.element_ty
    within, key, column = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    matrix = (piece * HV + head).to(tl.int64) * K * V
    if STORE:
        grad_state = load_tile(grad_leaving_ptr + matrix, key, key < K, column, V)
    else:
        grad_state = tl.zeros((BK, BV), dtype=tl.float32)
    num_chunks = tl.maximum(end - start + C - 1, 0) // C
    first_chunk = tl.load(chunk_ptr + piece).to(tl.int64)
    # From the last chunk to the first.
    for done in range(0, num_chunks):
        chunk = first_chunk + num_chunks - 1 - done
        first = start + (num_chunks - 1 - done) * C
        place = first + within
        valid = place < end
        row, _, is_read = load_rows(row_ptr, token_ptr, place, valid)
        sorted_row = head.to(tl.int64) * num_rows + first
        keeping = load_tile(keeping_ptr + sorted_row * K, within, valid, key, K)
        grad_d = tl.dot(keeping, grad_state.to(dtype), input_precision=PRECISION)
        grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(tl.float32)
        grad_o = (grad_o * tl.load(read_ptr + row, mask=valid, other=0.0)[:, None]).to(dtype)
        scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C)
        grad_d = tl.dot(tl.trans(scores), grad_o, grad_d, input_precision=PRECISION)
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        grad_change = tl.dot(tl.trans(inverse), grad_d.to(dtype), input_precision=PRECISION)
        if STORE:
            store_tile(grad_states_ptr + (chunk * HV + head) * K * V, key, key < K, column, grad_state, V)
            store_tile(grad_change_ptr + sorted_row * V, within, valid, column, grad_change, V)

        grad_state *= load_decay(decay_ptr, chunk, head, key, HV, K)
        reading = load_tile(reading_ptr + sorted_row * K, within, valid, key, K)
        grad_state = tl.dot(tl.trans(reading), grad_o, grad_state, input_precision=PRECISION)
        beta = load_gate(beta_ptr, 0, head, first, within, valid, num_rows, HV)
        grad_change = (-beta[:, None] * grad_change).to(dtype)
        recalling = load_tile(recalling_ptr + sorted_row * K, within, valid, key, K)
        grad_state = tl.dot(tl.trans(recalling), grad_change, grad_state, input_precision=PRECISION)
    if not STORE:
        store_tile(grad_entering_ptr + matrix, key, key < K, column, grad_state, V)


@triton.jit(do_not_specialize=["num_rows"])
def kda_scores_backward_kernel(
    v_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    scores_ptr,
    met_ptr,
    beta_ptr,
    grad_o_ptr,
    d_ptr,
    grad_change_ptr,
    grad_scores_ptr,
    grad_met_ptr,
    grad_gates_ptr,
    grad_v_ptr,
    grad_write_ptr,
    num_rows,
    HV: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of scores, met, v and write; program (chunk, value head).

    Also what the pairs of rows inside the chunk contribute to the gradients of beta (0) and of read (1).
    """
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = d_ptr.dtype.element_ty
    within = tl.arange(0, C)
    place = start + within
    valid = place < end
    row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    sorted_row = head.to(tl.int64) * num_rows + start
    write = tl.load(write_ptr + row, mask=valid, other=0.0)
    beta = load_gate(beta_ptr, 0, head, start, within, valid, num_rows, HV)

    grad_scores = tl.zeros((C, C), dtype=tl.float32)
    grad_met = tl.zeros((C, C), dtype=tl.float32)
    grad_written = tl.zeros((C,), dtype=tl.float32)
    for first in tl.range(0, V, BV):
        column = first + tl.arange(0, BV)
        d = load_tile(d_ptr + sorted_row * V, within, valid, column, V)
        grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(dtype)
        grad_scores = tl.dot(grad_o, tl.trans(d), grad_scores, input_precision=PRECISION)
        grad_change = load_tile(grad_change_ptr + sorted_row * V, within, valid, column, V)
        grad_met = tl.dot(grad_change, tl.trans(d), grad_met, input_precision=PRECISION)
        grad_change = grad_change.to(tl.float32)
        v = load_tile(v_ptr, token * HV + head, is_read, column, V).to(tl.float32)
        grad_written += tl.sum(grad_change * v, axis=1)
        grad_v = (write * beta)[:, None] * grad_change
        store_tile(grad_v_ptr, row * HV + head, valid, column, grad_v, V)
    tl.store(grad_write_ptr + row * HV + head, beta * grad_written, mask=valid)

    t, s = within[:, None], within[None, :]
    run, _, _ = load_runs(run_ptr, start, end, C)
    same = run[:, None] == run[None, :]
    grad_scores = tl.where(same & (t >= s), grad_scores, 0.0)
    grad_met = tl.where(same & (t > s), -grad_met, 0.0)
    scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C).to(tl.float32)
    store_gate(grad_gates_ptr, 1, head, start, within, valid, tl.sum(scores * grad_scores, axis=1), num_rows, HV)
    met = load_tile(met_ptr + sorted_row * C, within, valid, within, C)
    grad_beta = write * grad_written + tl.sum(met * grad_met, axis=1)
    store_gate(grad_gates_ptr, 0, head, start, within, valid, grad_beta, num_rows, HV)
    read = tl.load(read_ptr + row, mask=valid, other=0.0)
    store_tile(grad_scores_ptr + sorted_row * C, within, valid, within, read[:, None] * grad_scores, C)
    store_tile(grad_met_ptr + sorted_row * C, within, valid, within, beta[:, None] * grad_met, C)


@triton.jit(do_not_specialize=["num_rows"])
def kda_inter_kernel(
    writes_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    reading_ptr,
    recalling_ptr,
    decay_ptr,
    beta_ptr,
    states_ptr,
    grad_states_ptr,
    grad_o_ptr,
    d_ptr,
    grad_change_ptr,
    grad_gates_ptr,
    grad_reading_ptr,
    grad_recalling_ptr,
    grad_keeping_ptr,
    through_ptr,
    grad_beta_ptr,
    grad_read_ptr,
    num_rows,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of what meets the states at the chunk's borders; program (chunk, value head).

    These are the gradients of reading, recalling and keeping, in sorted order, and of the log decays through the
    state that passes the chunk, [G, HV, K]; with them those of beta and read are complete.
    """
    chunk, head = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = d_ptr.dtype.element_ty
    within = tl.arange(0, C)
    place = start + within
    valid = place < end
    row, _, is_read = load_rows(row_ptr, token_ptr, place, valid)
    sorted_row = head.to(tl.int64) * num_rows + start
    matrix = (chunk * HV + head) * K * V
    read = tl.load(read_ptr + row, mask=valid, other=0.0)
    beta = load_gate(beta_ptr, 0, head, start, within, valid, num_rows, HV)
    recalled = tl.zeros((C,), dtype=tl.float32)
    grad_read = load_gate(grad_gates_ptr, 1, head, start, within, valid, num_rows, HV)
    for first_key in tl.range(0, K, BK):
        key = first_key + tl.arange(0, BK)
        grad_reading = tl.zeros((C, BK), dtype=tl.float32)
        grad_recalling = tl.zeros((C, BK), dtype=tl.float32)
        grad_keeping = tl.zeros((C, BK), dtype=tl.float32)
        through = tl.zeros((BK,), dtype=tl.float32)
        for first in tl.range(0, V, BV):
            column = first + tl.arange(0, BV)
            state = load_tile(states_ptr + matrix, key, key < K, column, V)
            grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(dtype)
            grad_reading = tl.dot(grad_o, tl.trans(state), grad_reading, input_precision=PRECISION)
            grad_change = load_tile(grad_change_ptr + sorted_row * V, within, valid, column, V)
            grad_recalling = tl.dot(grad_change, tl.trans(state), grad_recalling, input_precision=PRECISION)
            grad_state = load_tile(grad_states_ptr + matrix, key, key < K, column, V)
            d = load_tile(d_ptr + sorted_row * V, within, valid, column, V)
            grad_keeping = tl.dot(d, tl.trans(grad_state), grad_keeping, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
        reading = load_tile(reading_ptr + sorted_row * K, within, valid, key, K).to(tl.float32)
        grad_read += tl.sum(reading * grad_reading, axis=1)
        store_tile(grad_reading_ptr + sorted_row * K, within, valid, key, read[:, None] * grad_reading, K)
        recalling = load_tile(recalling_ptr + sorted_row * K, within, valid, key, K).to(tl.float32)
        recalled += tl.sum(recalling * grad_recalling, axis=1)
        store_tile(grad_recalling_ptr + sorted_row * K, within, valid, key, -beta[:, None] * grad_recalling, K)
        store_tile(grad_keeping_ptr + sorted_row * K, within, valid, key, grad_keeping, K)
        offset = (chunk * HV + head) * K + key
        decay = tl.load(decay_ptr + offset, mask=key < K, other=0.0)
        tl.store(through_ptr + offset, decay * through, mask=key < K)
    grad_beta = load_gate(grad_gates_ptr, 0, head, start, within, valid, num_rows, HV) - recalled
    grad_beta *= tl.load(writes_ptr + row, mask=valid, other=0.0)
    tl.store(grad_beta_ptr + row * HV + head, grad_beta, mask=valid)
    tl.store(grad_read_ptr + row * HV + head, grad_read, mask=valid)


@triton.jit
def _sum_after(x, SIZE: tl.constexpr):
    """Return, of each row, the sum [C, K] over it and the rows behind it in its block of SIZE rows."""
    C: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    return tl.reshape(tl.cumsum(tl.reshape(x, [C // SIZE, SIZE, K]), 1, reverse=True), [C, K])


@triton.jit
def _across(
    x, k, g, next_g, grad_pairs, dtype: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the gradients of x, k and g from the pairs of each later half of 2 HALF rows with its earlier half.

    Every pair passes the border between the halves, so log decays of the later half have a part in those with its rows
    from their own on, those of the earlier half in those with its rows before. No sums are subtracted, so that a row
    that forgets everything gets a gradient of 0.
    """
    grad_x, grad_k = met_across(x, k, g, next_g, grad_pairs, dtype, C, HALF, PRECISION)
    leaving = k * grad_k
    grad_g = _sum_after(x * grad_x, HALF) + sum_from_start(leaving, HALF) - leaving
    return grad_x, grad_k, grad_g


@triton.jit
def _pairs_backward(
    x,
    k,
    g,
    next_g,
    grad_pairs,
    dtype: tl.constexpr,
    C: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the gradients of x, k and g through kda_forward.pair_products, without the pairs of a row with itself.

    What pairs inside mild blocks give to g comes last: its sums from a row to its document's end in the block do.
    """
    grad_x = tl.zeros_like(x)
    grad_k = tl.zeros_like(x)
    grad_g = tl.zeros_like(x)
    crossing = tl.zeros_like(x)
    for level in tl.static_range(2):
        gx, gk, gg = _across(x, k, g, next_g, grad_pairs, dtype, C, 32 >> level, PRECISION)
        grad_x, grad_k, grad_g = grad_x + gx, grad_k + gk, grad_g + gg
    sums = sum_from_start(g, 16)
    if tl.min(sums) >= -MILD:
        gx, gk = met_inside(x, k, sums, tl.where(pairs_inside(C, 16), grad_pairs, 0.0), dtype, PRECISION)
        # Summed over the rows from j on, x dx adds the pairs with t >= j, and k dk takes away those with s >= j.
        crossing = x * gx - k * gk
        grad_x, grad_k = grad_x + gx, grad_k + gk
    else:
        for level in tl.static_range(4):
            gx, gk, gg = _across(x, k, g, next_g, grad_pairs, dtype, C, 8 >> level, PRECISION)
            grad_x, grad_k, grad_g = grad_x + gx, grad_k + gk, grad_g + gg
    return grad_x, grad_k, grad_g, crossing


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def kda_intra_kernel(
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
    grad_scores_ptr,
    grad_met_ptr,
    grad_reading_ptr,
    grad_recalling_ptr,
    grad_keeping_ptr,
    through_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_g_ptr,
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
    """Compute the gradients of q, k and g by row, per value head; program (chunk, value head, block of K)."""
    blocks: tl.constexpr = (K + BK - 1) // BK
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    chunk = (tl.program_id(0) // (blocks * HV)).to(tl.int64)
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = grad_scores_ptr.dtype.element_ty
    if start >= num_tokens:
        q1_ptr, k1_ptr, g1_ptr = q2_ptr, k2_ptr, g2_ptr
    within, key = tl.arange(0, C), block * BK + tl.arange(0, BK)
    place = start + within
    valid = place < end
    row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    key_row = token * H + head // (HV // H)
    sorted_row = head.to(tl.int64) * num_rows + start
    run, before, last = load_runs(run_ptr, start, end, C)
    g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place, end, head, key, HV, K)
    next_g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place + 1, end, head, key, HV, K)
    q = load_tile(q1_ptr, key_row, is_read, key, K).to(tl.float32) * SCALE
    k = load_tile(k1_ptr, key_row, is_read, key, K).to(tl.float32)

    grad_pairs = load_tile(grad_scores_ptr + sorted_row * C, within, valid, within, C).to(tl.float32)
    own = tl.sum(tl.where(pairs_inside(C, 1), grad_pairs, 0.0), axis=1)[:, None]
    # A row's score with itself has no decay, so it is kept out of the gradient of g.
    grad_pairs = tl.where(pairs_inside(C, 1), 0.0, grad_pairs)
    grad_q, grad_k, grad_g, crossing = _pairs_backward(q, k, g, next_g, grad_pairs, dtype, C, MILD, PRECISION)
    # Rows of the run before see the state that enters: their own log decays and those before them decay it.
    sees = (run == before)[:, None]
    from_start = tl.where(sees, tl.exp(tl.cumsum(g, axis=0)), 0.0)
    entering = from_start * load_tile(grad_reading_ptr + sorted_row * K, within, valid, key, K).to(tl.float32)
    grad_g += tl.cumsum(q * entering, axis=0, reverse=True)
    grad_k += own * q
    store_tile(grad_q_ptr, row * HV + head, valid, key, (grad_q + own * k + entering) * SCALE, K)
    # Loaded again: kept in registers in between, they would spill.
    g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place, end, head, key, HV, K)
    next_g = load_decays(g1_ptr, writes_ptr, row_ptr, token_ptr, run_ptr, place + 1, end, head, key, HV, K)
    k = load_tile(k1_ptr, key_row, is_read, key, K).to(tl.float32)
    grad_pairs = load_tile(grad_met_ptr + sorted_row * C, within, valid, within, C).to(tl.float32)
    by_row, by_column, gg, more = _pairs_backward(k, k, g, next_g, grad_pairs, dtype, C, MILD, PRECISION)
    grad_k += by_row + by_column
    next_run = tl.load(run_ptr + place + 1, mask=place + 1 < end, other=-1)
    grad_g += gg + sum_later(crossing + more, (run != next_run) | (within % 16 == 15))

    from_start = tl.where(sees, tl.exp(tl.cumsum(g, axis=0)), 0.0)
    entering = from_start * load_tile(grad_recalling_ptr + sorted_row * K, within, valid, key, K).to(tl.float32)
    grad_g += tl.cumsum(k * entering, axis=0, reverse=True)
    to_end = tl.where((run == last)[:, None], tl.exp(tl.cumsum(next_g, axis=0, reverse=True)), 0.0)
    kept = to_end * load_tile(grad_keeping_ptr + sorted_row * K, within, valid, key, K).to(tl.float32)
    store_tile(grad_k_ptr, row * HV + head, valid, key, grad_k + entering + kept, K)
    # Log decays behind a row decay what it leaves: an exclusive sum from the chunk's start.
    grad_g += tl.cumsum(k * kept, axis=0) - k * kept
    grad_g += tl.load(through_ptr + (chunk * HV + head) * K + key, mask=key < K, other=0.0)[None, :]
    decaying = load_decaying(writes_ptr, row_ptr, run_ptr, place, end)[:, None]
    store_tile(grad_g_ptr, row * HV + head, valid, key, tl.where(decaying, grad_g, 0.0), K)
