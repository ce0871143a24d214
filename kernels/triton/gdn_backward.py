"""The gated delta rule, backward: gradients of the states from the last chunk to the first, then of the inputs.

With the names of gdn_forward.py, do the output's gradient times read, and dS the gradient of the state that leaves a
chunk: dd = scores^T do + E (k dS) is the gradient of what is written, dx = inverse^T dd that of
beta (write v - F (k S)), and dS <- F_last dS + (F q / sqrt(K))^T do - (F beta k)^T dx. With x what the inverse is
applied to, its gradient is dd x^T; that of the matrix it inverts is -inverse^T dd x^T inverse^T = -dx d^T, so that of
beta k k^T P is -dx d^T below the diagonal.
"""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gdn_forward import (
    load_gate,
    load_rows,
    load_runs,
    load_starts,
    load_tile,
    pair_decay,
    store_gate,
    store_tile,
)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_states_backward_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    inverse_ptr,
    scores_ptr,
    gates_ptr,
    grad_o_ptr,
    grad_leaving_ptr,
    grad_entering_ptr,
    grad_states_ptr,
    grad_change_ptr,
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
    """Compute the gradient of the state that enters a piece, through its own outputs alone.

    Program (piece, value head, block of V). Where STORE, it starts instead from the gradient of the state that leaves
    the piece, and stores the gradient of the state that leaves each chunk, and dx in sorted order.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    piece = tl.program_id(0) // (blocks * HV)
    start, end = tl.load(piece_start_ptr + piece).to(tl.int32), tl.load(piece_end_ptr + piece).to(tl.int32)
    dtype = inverse_ptr.dtype.element_ty
    if start >= num_tokens:
        q1_ptr, k1_ptr = q2_ptr, k2_ptr
    within, key, column = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = (piece * HV + head).to(tl.int64) * K * V
    if STORE:
        grad_state = load_tile(grad_leaving_ptr + state, key, key < K, column, V)
    else:
        grad_state = tl.zeros((BK, BV), dtype=tl.float32)
    num_chunks = tl.maximum(end - start + C - 1, 0) // C
    first_chunk = tl.load(chunk_ptr + piece).to(tl.int64)
    # From the last chunk to the first.
    for done in range(0, num_chunks):
        first = start + (num_chunks - 1 - done) * C
        place = first + within
        valid = place < end
        row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
        sorted_row = head.to(tl.int64) * num_rows + first
        key_row = token * H + head // (HV // H)
        k = load_tile(k1_ptr, key_row, is_read, key, K).to(dtype)
        to_end = load_gate(gates_ptr, 3, head, first, within, valid, num_rows, HV)
        grad_d = to_end[:, None] * tl.dot(k, grad_state.to(dtype), input_precision="ieee")
        grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(tl.float32)
        grad_o *= tl.load(read_ptr + row, mask=valid, other=0.0)[:, None]
        scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C)
        grad_d = tl.dot(tl.trans(scores), grad_o.to(dtype), grad_d, input_precision="ieee")
        inverse = load_tile(inverse_ptr + sorted_row * C, within, valid, within, C)
        grad_change = tl.dot(tl.trans(inverse), grad_d.to(dtype), input_precision="ieee")
        if STORE:
            state = ((first_chunk + num_chunks - 1 - done) * HV + head) * K * V
            store_tile(grad_states_ptr + state, key, key < K, column, grad_state, V)
            store_tile(grad_change_ptr + sorted_row * V, within, valid, column, grad_change, V)

        beta = load_gate(gates_ptr, 1, head, first, within, valid, num_rows, HV)
        from_start = load_gate(gates_ptr, 2, head, first, within, valid, num_rows, HV)
        grad_state *= load_gate(gates_ptr, 2, head, tl.minimum(first + C, end), -1, True, num_rows, HV)
        q = load_tile(q1_ptr, key_row, is_read, key, K).to(dtype)
        grad_o = ((SCALE * from_start)[:, None] * grad_o).to(dtype)
        grad_state = tl.dot(tl.trans(q), grad_o, grad_state, input_precision="ieee")
        grad_change = (-(beta * from_start)[:, None] * grad_change).to(dtype)
        grad_state = tl.dot(tl.trans(k), grad_change, grad_state, input_precision="ieee")
    if not STORE:
        store_tile(grad_entering_ptr + state, key, key < K, column, grad_state, V)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_scores_backward_kernel(
    k1_ptr,
    k2_ptr,
    v_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    scores_ptr,
    gates_ptr,
    grad_o_ptr,
    d_ptr,
    grad_change_ptr,
    grad_scores_ptr,
    grad_met_ptr,
    grad_gates_ptr,
    grad_v_ptr,
    grad_write_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of q k^T (before `read`), k k^T, v and write; program (chunk, value head).

    Also what the pairs of rows inside the chunk contribute to the gradients of g and beta.
    """
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = d_ptr.dtype.element_ty
    if start >= num_tokens:
        k1_ptr = k2_ptr
    within = tl.arange(0, C)
    place = start + within
    valid = place < end
    row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    sorted_row = head.to(tl.int64) * num_rows + start
    write = tl.load(write_ptr + row, mask=valid, other=0.0)
    beta = load_gate(gates_ptr, 1, head, start, within, valid, num_rows, HV)

    grad_scores = tl.zeros((C, C), dtype=tl.float32)
    grad_met = tl.zeros((C, C), dtype=tl.float32)
    grad_written = tl.zeros((C,), dtype=tl.float32)
    for first in tl.range(0, V, BV):
        column = first + tl.arange(0, BV)
        d = load_tile(d_ptr + sorted_row * V, within, valid, column, V)
        grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(dtype)
        grad_scores = tl.dot(grad_o, tl.trans(d), grad_scores, input_precision="ieee")
        grad_change = load_tile(grad_change_ptr + sorted_row * V, within, valid, column, V)
        grad_met = tl.dot(grad_change, tl.trans(d), grad_met, input_precision="ieee")
        grad_change = grad_change.to(tl.float32)
        v = load_tile(v_ptr, token * HV + head, is_read, column, V).to(tl.float32)
        grad_written += tl.sum(grad_change * v, axis=1)
        grad_v = (write * beta)[:, None] * grad_change
        store_tile(grad_v_ptr, row * HV + head, valid, column, grad_v, V)
    tl.store(grad_write_ptr + row * HV + head, beta * grad_written, mask=valid)

    met = tl.zeros((C, C), dtype=tl.float32)
    for first in tl.range(0, K, BK):
        k = load_tile(k1_ptr, token * H + head // (HV // H), is_read, first + tl.arange(0, BK), K).to(dtype)
        met = tl.dot(k, tl.trans(k), met, input_precision="ieee")

    t, s = within[:, None], within[None, :]
    run, _, _ = load_runs(run_ptr, start, end, C)
    decay = pair_decay(load_gate(gates_ptr, 0, head, start, within, valid, num_rows, HV), run, C)
    scores = load_tile(scores_ptr + sorted_row * C, within, valid, within, C).to(tl.float32)
    read = tl.load(read_ptr + row, mask=valid, other=0.0)
    # scores holds its decay already, so its product with its gradient is the gradient of the pair's summed log decay.
    through_decay = tl.where(t > s, read[:, None] * grad_scores * scores, 0.0)
    store_tile(grad_scores_ptr + sorted_row * C, within, valid, within, SCALE * grad_scores * decay, C)
    grad_met = tl.where(t > s, -grad_met * decay, 0.0)
    store_tile(grad_met_ptr + sorted_row * C, within, valid, within, beta[:, None] * grad_met, C)
    grad_beta = write * grad_written + tl.sum(grad_met * met, axis=1)
    through_decay += beta[:, None] * grad_met * met

    # g_j decays the pairs s < j <= t: for each t, an exclusive sum over s gives those before j; then sum over t >= j.
    before = tl.cumsum(through_decay, axis=1) - through_decay
    grad_g = tl.sum(tl.where(t >= s, before, 0.0), axis=0)
    store_gate(grad_gates_ptr, 0, head, start, within, valid, grad_g, num_rows, HV)
    store_gate(grad_gates_ptr, 1, head, start, within, valid, grad_beta, num_rows, HV)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def gdn_keys_backward_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    gates_ptr,
    states_ptr,
    grad_states_ptr,
    grad_o_ptr,
    d_ptr,
    grad_change_ptr,
    grad_scores_ptr,
    grad_met_ptr,
    sums_ptr,
    grad_q_ptr,
    grad_k_ptr,
    num_tokens,
    num_rows,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of q and k; program (chunk, value head, block of K).

    Also stored, per row, are this block's parts of sums that the gradients of g, beta and read need: q dq through the
    entering state (0), k dk through the entering state (1) and through the leaving state (2), all of q dq (3), and
    S dS of the chunk, at its first row (4).
    """
    blocks: tl.constexpr = (K + BK - 1) // BK
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % HV
    chunk = (tl.program_id(0) // (blocks * HV)).to(tl.int64)
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    dtype = d_ptr.dtype.element_ty
    if start >= num_tokens:
        q1_ptr, k1_ptr = q2_ptr, k2_ptr
    within = tl.arange(0, C)
    place = start + within
    valid = place < end
    row, token, is_read = load_rows(row_ptr, token_ptr, place, valid)
    sorted_row = head.to(tl.int64) * num_rows + start
    key_row = token * H + head // (HV // H)
    key = block * BK + tl.arange(0, BK)
    matrix = (chunk * HV + head) * K * V
    # Each block of K writes sums of its own, [blocks, 5, HV, R]; gdn_gates_backward_kernel adds them up.
    sums_ptr += block.to(tl.int64) * 5 * HV * num_rows
    from_start = load_gate(gates_ptr, 2, head, start, within, valid, num_rows, HV)
    read = tl.load(read_ptr + row, mask=valid, other=0.0)

    grad_q = tl.zeros((C, BK), dtype=tl.float32)
    for first in tl.range(0, V, BV):
        column = first + tl.arange(0, BV)
        state = load_tile(states_ptr + matrix, key, key < K, column, V)
        grad_o = load_tile(grad_o_ptr, row * HV + head, is_read, column, V).to(dtype)
        grad_q = tl.dot(grad_o, tl.trans(state), grad_q, input_precision="ieee")
    grad_q *= (SCALE * from_start)[:, None]
    q = load_tile(q1_ptr, key_row, is_read, key, K).to(tl.float32)
    store_gate(sums_ptr, 0, head, start, within, valid, tl.sum(q * grad_q, axis=1), num_rows, HV)
    k = load_tile(k1_ptr, key_row, is_read, key, K).to(dtype)
    grad_scores = load_tile(grad_scores_ptr + sorted_row * C, within, valid, within, C)
    grad_q = tl.dot(grad_scores, k, grad_q, input_precision="ieee")
    store_gate(sums_ptr, 3, head, start, within, valid, tl.sum(q * grad_q, axis=1), num_rows, HV)
    store_tile(grad_q_ptr, row * HV + head, valid, key, read[:, None] * grad_q, K)

    grad_recall = tl.zeros((C, BK), dtype=tl.float32)
    grad_k = tl.zeros((C, BK), dtype=tl.float32)
    grad_decay = tl.zeros((BK,), dtype=tl.float32)
    for first in tl.range(0, V, BV):
        column = first + tl.arange(0, BV)
        state = load_tile(states_ptr + matrix, key, key < K, column, V)
        grad_change = load_tile(grad_change_ptr + sorted_row * V, within, valid, column, V)
        grad_recall = tl.dot(grad_change, tl.trans(state), grad_recall, input_precision="ieee")
        grad_state = load_tile(grad_states_ptr + matrix, key, key < K, column, V)
        d = load_tile(d_ptr + sorted_row * V, within, valid, column, V)
        grad_k = tl.dot(d, tl.trans(grad_state), grad_k, input_precision="ieee")
        grad_decay += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
    # q, k and the scores' gradients are loaded twice: kept in registers in between, they would spill.
    k = load_tile(k1_ptr, key_row, is_read, key, K).to(dtype)
    grad_decay = tl.where(within == 0, tl.sum(grad_decay, axis=0), 0.0)
    store_gate(sums_ptr, 4, head, start, within, valid, grad_decay, num_rows, HV)
    grad_recall *= from_start[:, None]
    k_entering = tl.sum(k.to(tl.float32) * grad_recall, axis=1)
    store_gate(sums_ptr, 1, head, start, within, valid, k_entering, num_rows, HV)
    grad_k *= load_gate(gates_ptr, 3, head, start, within, valid, num_rows, HV)[:, None]
    k_leaving = tl.sum(k.to(tl.float32) * grad_k, axis=1)
    store_gate(sums_ptr, 2, head, start, within, valid, k_leaving, num_rows, HV)

    grad_k -= load_gate(gates_ptr, 1, head, start, within, valid, num_rows, HV)[:, None] * grad_recall
    q = load_tile(q1_ptr, key_row, is_read, key, K).to(tl.float32)
    grad_scores = load_tile(grad_scores_ptr + sorted_row * C, within, valid, within, C)
    grad_k = tl.dot(tl.trans(grad_scores), (read[:, None] * q).to(dtype), grad_k, input_precision="ieee")
    grad_met = load_tile(grad_met_ptr + sorted_row * C, within, valid, within, C)
    # k k^T has k on both sides, so its gradient enters as it is and transposed.
    grad_k = tl.dot(grad_met, k, grad_k, input_precision="ieee")
    grad_k = tl.dot(tl.trans(grad_met), k, grad_k, input_precision="ieee")
    store_tile(grad_k_ptr, row * HV + head, valid, key, grad_k, K)


@triton.jit(do_not_specialize=["num_rows"])
def gdn_gates_backward_kernel(
    writes_ptr,
    read_ptr,
    row_ptr,
    run_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    gates_ptr,
    grad_gates_ptr,
    sums_ptr,
    grad_g_ptr,
    grad_beta_ptr,
    grad_read_ptr,
    num_rows,
    HV: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):
    """Compute the gradients of g, beta and read; program (chunk, value head)."""
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    if start >= end:
        return
    within = tl.arange(0, C)
    valid = start + within < end
    row = tl.load(row_ptr + start + within, mask=valid, other=0).to(tl.int64)
    q_entering = tl.zeros((C,), dtype=tl.float32)
    k_entering = tl.zeros((C,), dtype=tl.float32)
    k_leaving = tl.zeros((C,), dtype=tl.float32)
    grad_read = tl.zeros((C,), dtype=tl.float32)
    grad_decay = tl.zeros((C,), dtype=tl.float32)
    for _ in tl.static_range(KEY_BLOCKS):
        q_entering += load_gate(sums_ptr, 0, head, start, within, valid, num_rows, HV)
        k_entering += load_gate(sums_ptr, 1, head, start, within, valid, num_rows, HV)
        k_leaving += load_gate(sums_ptr, 2, head, start, within, valid, num_rows, HV)
        grad_read += load_gate(sums_ptr, 3, head, start, within, valid, num_rows, HV)
        grad_decay += load_gate(sums_ptr, 4, head, start, within, valid, num_rows, HV)
        sums_ptr += 5 * HV * num_rows.to(tl.int64)
    beta = load_gate(gates_ptr, 1, head, start, within, valid, num_rows, HV)
    decay = load_gate(gates_ptr, 2, head, end, -1, True, num_rows, HV)
    read = tl.load(read_ptr + row, mask=valid, other=0.0)
    writes = tl.load(writes_ptr + row, mask=valid, other=0.0)
    # g_j decays the entering state for all rows t >= j, what the rows s < j write into the leaving state, the entering
    # state on its way to the leaving one, and the pairs s < j <= t.
    grad_g = tl.cumsum(read * q_entering - beta * k_entering, axis=0, reverse=True)
    grad_g += tl.cumsum(k_leaving, axis=0) - k_leaving + decay * tl.sum(grad_decay, axis=0)
    grad_g += load_gate(grad_gates_ptr, 0, head, start, within, valid, num_rows, HV)
    grad_beta = load_gate(grad_gates_ptr, 1, head, start, within, valid, num_rows, HV) - k_entering
    grad_g = tl.where(load_starts(run_ptr, start + within, valid), 0.0, writes * grad_g)
    tl.store(grad_g_ptr + row * HV + head, grad_g, mask=valid)
    tl.store(grad_beta_ptr + row * HV + head, writes * grad_beta, mask=valid)
    tl.store(grad_read_ptr + row * HV + head, grad_read, mask=valid)
