"""Gated linear attention, forward. Tiles: C rows of a chunk, K key dims, V value dims.

`summarize` and `output` walk over the chunks of a piece with the state in registers, so that the states inside a piece
are never written to memory. `prepare` works on each chunk alone and stores, at the rows' sorted positions, what
`output` and the backward kernels read: queries decayed from the chunk's start, keys decayed to its end, scores, and the
chunk's decay.
"""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gla_tiles import (
    load_log_decays,
    load_rows,
    load_runs,
    pairs_inside,
    state_offsets,
    store_rows,
    sum_from_start,
    sum_to_end,
)


@triton.jit(do_not_specialize=["num_tokens"])
def gla_summarize_kernel(
    x1_ptr,
    x2_ptr,
    g1_ptr,
    g2_ptr,
    y_ptr,
    writes_ptr,
    factor_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    piece_start_ptr,
    piece_end_ptr,
    transition_ptr,
    state_ptr,
    num_tokens,
    num_heads,
    num_value_heads,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute state <- exp(sum g) state + decayed x^T (factor y) over a piece's chunks, starting from zero.

    Program (piece and tile of the state, value head). Forward: x is k, decayed to the chunk's end, y is v and factor is
    write; the result is the piece's increment, and its transition is stored too. In REVERSE, from the last chunk to the
    first: x is q, decayed from the chunk's start, y is the gradient of o (by row) and factor is read; the result is the
    gradient of the state that enters the piece.
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * blocks_v
    piece, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    # Neighbouring value heads share a key head.
    key_head = head // (num_value_heads // num_heads)
    dim_K = block // blocks_v * BLOCK_K + tl.arange(0, BLOCK_K)
    # Programs of one piece are neighbours, so that the rows they all read are likely to be in the cache.
    dim_V = block % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    x_ptr, g_ptr = x1_ptr, g1_ptr
    # Sorted positions from num_tokens on are picks: they use the partitions' tensors.
    if start >= num_tokens:
        x_ptr, g_ptr = x2_ptr, g2_ptr

    b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    total_K = tl.zeros([BLOCK_K], tl.float32)
    dtype = y_ptr.dtype.element_ty
    num_chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for i in range(0, num_chunks):
        chunk_start = start + (num_chunks - 1 - i if REVERSE else i) * CHUNK
        chunk_end = tl.minimum(chunk_start + CHUNK, end)
        position_C = chunk_start + tl.arange(0, CHUNK)
        valid_C = position_C < chunk_end
        row_C = tl.load(row_ptr + position_C, mask=valid_C, other=0)
        token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
        factor_C = tl.load(factor_ptr + row_C, mask=valid_C, other=0.0)
        run_C, before, last = load_runs(run_ptr, chunk_start, chunk_end, CHUNK)
        b_g = load_log_decays(
            g_ptr, writes_ptr, row_ptr, token_ptr, position_C, chunk_end, key_head, num_heads, dim_K, K
        )
        total = tl.sum(b_g, 0)
        total_K += total
        if REVERSE:
            b_sum = sum_from_start(b_g, CHUNK)
        else:
            # The state decays by a row's g before the row writes: its key is decayed by the rows after it alone.
            b_next = load_log_decays(
                g_ptr, writes_ptr, row_ptr, token_ptr, position_C + 1, chunk_end, key_head, num_heads, dim_K, K
            )
            b_sum = sum_to_end(b_next, CHUNK)
        b_x = load_rows(x_ptr, token_C, token_C >= 0, key_head, num_heads, dim_K, K)
        b_x = (b_x.to(tl.float32) * tl.exp(b_sum) * SCALE).to(dtype)
        # Only rows that no reset separates from the chunk's border meet the state there.
        b_x = tl.where((run_C == (before if REVERSE else last))[:, None], b_x, 0.0)
        b_y = load_rows(y_ptr, row_C if REVERSE else token_C, token_C >= 0, head, num_value_heads, dim_V, V)
        b_y = (b_y.to(tl.float32) * factor_C[:, None]).to(dtype)
        # The chunk's rows were decayed to its border, so the state is decayed by the chunk and their product is added.
        b_decay = tl.where(before == last, tl.exp(total), 0.0)
        b_state = tl.dot(tl.trans(b_x), b_y, b_state * b_decay[:, None], input_precision=PRECISION)

    offset_KV, mask_KV = state_offsets(piece, head, num_value_heads, dim_K, dim_V, K, V)
    tl.store(state_ptr + offset_KV, b_state, mask=mask_KV)
    if not REVERSE:
        # All blocks of V have the same transition, so only the first stores it.
        offset_K = (piece.to(tl.int64) * num_value_heads + head) * K + dim_K
        _, before, last = load_runs(run_ptr, start, end, CHUNK)
        b_decay = tl.where(before == last, tl.exp(total_K), 0.0)
        tl.store(transition_ptr + offset_K, b_decay, mask=(dim_K < K) & (block % blocks_v == 0))


@triton.jit(do_not_specialize=["num_tokens"])
def gla_prepare_kernel(
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
    query_ptr,
    key_ptr,
    scores_ptr,
    decay_ptr,
    steep_ptr,
    num_tokens,
    num_heads,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute what needs no state for a chunk of one key head.

    These are decayed queries and keys [.., H, K] and scores [.., H, C] by position, the chunk's decay [G, H, K], all
    zero where a document starts in between, and whether the chunk is steep [G, H]: then a channel decays below
    exp(-MILD), the scores stored here are not valid, and gla_steep_scores_kernel replaces them.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_end_ptr + chunk)
    # Chunks and pieces are cut into tables of a fixed size; the unused ones are empty.
    if end <= start:
        return
    q_ptr, k_ptr, g_ptr = q1_ptr, k1_ptr, g1_ptr
    if start >= num_tokens:
        q_ptr, k_ptr, g_ptr = q2_ptr, k2_ptr, g2_ptr
    position_C = start + tl.arange(0, CHUNK)
    valid_C = position_C < end
    token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
    run_C, before, last = load_runs(run_ptr, start, end, CHUNK)

    dtype = query_ptr.dtype.element_ty
    b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    lowest_K = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        dim_K = first + tl.arange(0, BLOCK_K)
        b_next = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C + 1, end, head, num_heads, dim_K, K)
        b_k = load_rows(k_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32)
        b_key = tl.where((run_C == last)[:, None], b_k * tl.exp(sum_to_end(b_next, CHUNK)), 0.0)
        store_rows(key_ptr, position_C, valid_C, head, num_heads, dim_K, K, b_key)

        b_g = load_log_decays(g_ptr, writes_ptr, row_ptr, token_ptr, position_C, end, head, num_heads, dim_K, K)
        b_sum = sum_from_start(b_g, CHUNK)
        b_q = load_rows(q_ptr, token_C, token_C >= 0, head, num_heads, dim_K, K).to(tl.float32) * SCALE
        b_query = (b_q * tl.exp(b_sum)).to(dtype)
        b_entering = tl.where((run_C == before)[:, None], b_query, 0.0)
        store_rows(query_ptr, position_C, valid_C, head, num_heads, dim_K, K, b_entering)
        total_K = tl.sum(b_g, 0)
        b_decay = tl.where(before == last, tl.exp(total_K), 0.0)
        tl.store(decay_ptr + (chunk.to(tl.int64) * num_heads + head) * K + dim_K, b_decay, mask=dim_K < K)
        lowest_K = tl.minimum(lowest_K, total_K)

        # exp(sum_t - sum_s) as the product of q exp(sum_t) and k exp(-sum_s), which may grow as far as MILD allows.
        b_grown = (b_k * tl.exp(tl.minimum(-b_sum, MILD))).to(dtype)
        b_scores = tl.dot(b_query, tl.trans(b_grown), b_scores, input_precision=PRECISION)
    # Loaded again: kept in registers through the loop, they would spill.
    run_C, _, _ = load_runs(run_ptr, start, end, CHUNK)
    b_scores = tl.where(pairs_inside(CHUNK, CHUNK) & (run_C[:, None] == run_C[None, :]), b_scores, 0.0)
    store_rows(scores_ptr, position_C, valid_C, head, num_heads, tl.arange(0, CHUNK), CHUNK, b_scores)
    tl.store(steep_ptr + chunk * num_heads + head, (tl.min(lowest_K, 0) < -MILD).to(tl.int32))


@triton.jit
def gla_output_kernel(
    query_ptr,
    key_ptr,
    scores_ptr,
    decay_ptr,
    v_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    entering_ptr,
    o_ptr,
    num_heads,
    num_value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the outputs of a piece's rows, by row: read (decayed q state + scores (write v)).

    Program (piece and block of V, value head), with all of K.
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    piece, head = tl.program_id(0) // blocks_v, tl.program_id(1)
    key_head = head // (num_value_heads // num_heads)
    dim_K, dim_C = tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)
    dim_V = tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    if end <= start:
        return
    chunk = tl.load(chunk_ptr + piece)
    offset_KV, mask_KV = state_offsets(piece, head, num_value_heads, dim_K, dim_V, K, V)
    b_state = tl.load(entering_ptr + offset_KV, mask=mask_KV, other=0.0)
    dtype = v_ptr.dtype.element_ty
    for i in range(0, ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)):
        position_C = start + i * CHUNK + tl.arange(0, CHUNK)
        valid_C = position_C < end
        row_C = tl.load(row_ptr + position_C, mask=valid_C, other=0)
        token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
        write_C = tl.load(write_ptr + row_C, mask=valid_C, other=0.0)
        read_C = tl.load(read_ptr + row_C, mask=valid_C, other=0.0)
        b_query = load_rows(query_ptr, position_C, valid_C, key_head, num_heads, dim_K, K)
        b_key = load_rows(key_ptr, position_C, valid_C, key_head, num_heads, dim_K, K)
        b_scores = load_rows(scores_ptr, position_C, valid_C, key_head, num_heads, dim_C, CHUNK)
        b_v = load_rows(v_ptr, token_C, token_C >= 0, head, num_value_heads, dim_V, V)
        offset_K = ((chunk + i) * num_heads + key_head) * K + dim_K
        b_decay = tl.load(decay_ptr + offset_K, mask=dim_K < K, other=0.0)

        b_v = (b_v.to(tl.float32) * write_C[:, None]).to(dtype)
        b_o = tl.dot(b_query, b_state.to(dtype), input_precision=PRECISION)
        b_o = tl.dot(b_scores, b_v, b_o, input_precision=PRECISION)
        # Outputs go to the row's own place, not to its sorted position.
        store_rows(o_ptr, row_C, valid_C, head, num_value_heads, dim_V, V, b_o * read_C[:, None])
        b_state = tl.dot(tl.trans(b_key), b_v, b_state * b_decay[:, None], input_precision=PRECISION)
