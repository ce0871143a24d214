"""Gated linear attention, backward. Tiles: C rows of a chunk, K key dims, V value dims.

With S the state that enters a chunk, dS the gradient of the one that leaves it, and q, k decayed to the chunk's
borders: dq = do S^T, dk = v dS^T, dv = k dS + scores^T do, and the gradient of the scores is do v^T. `states` stores
every S; `inter` walks backwards with a block of rows of dS, `values` with a block of its columns; `intra` adds, for
each chunk, the gradients inside the chunk, and sums the gradients of the log decays.
A log decay's gradient sums everything that it decays: from rows before it to rows after it inside the chunk, from the
entering state to the rows after it, from the rows before it to the leaving state, and from the entering to the leaving
state ("through").
"""

import triton
import triton.language as tl

from megatron_sse.kernels.triton.gla_tiles import load_rows, pairs_inside, state_offsets, store_rows


@triton.jit
def gla_states_kernel(
    key_ptr,
    decay_ptr,
    v_ptr,
    write_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    entering_ptr,
    chunk_states_ptr,
    num_heads,
    num_value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the state that enters each chunk [G, HV, K, V], in v's dtype; program (piece and tile, value head)."""
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * blocks_v
    piece, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    # Neighbouring value heads share a key head.
    key_head = head // (num_value_heads // num_heads)
    dim_K = block // blocks_v * BLOCK_K + tl.arange(0, BLOCK_K)
    dim_V = block % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    if end <= start:
        return
    # The piece's first chunk: what `prepare` stored for its chunks is at chunk + i.
    chunk = tl.load(chunk_ptr + piece)
    offset_KV, mask_KV = state_offsets(piece, head, num_value_heads, dim_K, dim_V, K, V)
    b_state = tl.load(entering_ptr + offset_KV, mask=mask_KV, other=0.0)
    dtype = v_ptr.dtype.element_ty
    for i in range(0, ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)):
        offset_KV, _ = state_offsets(chunk + i, head, num_value_heads, dim_K, dim_V, K, V)
        tl.store(chunk_states_ptr + offset_KV, b_state.to(dtype), mask=mask_KV)
        position_C = start + i * CHUNK + tl.arange(0, CHUNK)
        valid_C = position_C < end
        row_C = tl.load(row_ptr + position_C, mask=valid_C, other=0)
        token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
        write_C = tl.load(write_ptr + row_C, mask=valid_C, other=0.0)
        b_key = load_rows(key_ptr, position_C, valid_C, key_head, num_heads, dim_K, K)
        b_v = load_rows(v_ptr, token_C, token_C >= 0, head, num_value_heads, dim_V, V)
        offset_K = ((chunk + i) * num_heads + key_head) * K + dim_K
        b_decay = tl.load(decay_ptr + offset_K, mask=dim_K < K, other=0.0)
        b_v = (b_v.to(tl.float32) * write_C[:, None]).to(dtype)
        b_state = tl.dot(tl.trans(b_key), b_v, b_state * b_decay[:, None], input_precision=PRECISION)


@triton.jit
def gla_inter_kernel(
    query_ptr,
    scores_ptr,
    decay_ptr,
    v_ptr,
    grad_o_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    chunk_states_ptr,
    grad_leaving_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_scores_ptr,
    through_ptr,
    read_partial_ptr,
    num_heads,
    num_value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk backwards over a piece with the gradient of the state; program (piece and block of K, value head), all V.

    Stored are the gradients of the decayed queries and keys [.., HV, K] by position, what passes through each chunk
    from state to state [G, HV, K], and partial sums of read's gradient [R, HV, blocks of K] by row; the first block
    also stores the gradient of the scores [.., HV, C] by position.
    The state's gradient is held as [V, K], so that no product needs its transpose.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    piece, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    key_head = head // (num_value_heads // num_heads)
    dim_K, dim_V, dim_C = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, CHUNK)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    if end <= start:
        return
    chunk = tl.load(chunk_ptr + piece)
    offset_KV, mask_KV = state_offsets(piece, head, num_value_heads, dim_K, dim_V, K, V)
    # Transposed by its addresses: the tensor in memory is [K, V].
    b_grad_state = tl.load(grad_leaving_ptr + tl.trans(offset_KV), mask=tl.trans(mask_KV), other=0.0)
    dtype = v_ptr.dtype.element_ty
    num_chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for back in range(0, num_chunks):
        i = num_chunks - 1 - back
        position_C = start + i * CHUNK + tl.arange(0, CHUNK)
        valid_C = position_C < end
        row_C = tl.load(row_ptr + position_C, mask=valid_C, other=0)
        token_C = tl.load(token_ptr + position_C, mask=valid_C, other=-1)
        write_C = tl.load(write_ptr + row_C, mask=valid_C, other=0.0)
        read_C = tl.load(read_ptr + row_C, mask=valid_C, other=0.0)
        b_query = load_rows(query_ptr, position_C, valid_C, key_head, num_heads, dim_K, K)
        b_v = load_rows(v_ptr, token_C, token_C >= 0, head, num_value_heads, dim_V, V)
        b_grad_o = load_rows(grad_o_ptr, row_C, token_C >= 0, head, num_value_heads, dim_V, V)
        offset_KV, _ = state_offsets(chunk + i, head, num_value_heads, dim_K, dim_V, K, V)
        b_state = tl.load(chunk_states_ptr + offset_KV, mask=mask_KV, other=0.0)
        offset_K = ((chunk + i) * num_heads + key_head) * K + dim_K
        b_decay = tl.load(decay_ptr + offset_K, mask=dim_K < K, other=0.0)

        b_state = tl.trans(b_state)
        # The gradient of the chunk's log decay by way of the state: S and dS multiplied, times the decay.
        b_through = b_decay * tl.sum(b_state.to(tl.float32) * b_grad_state, 0)
        tl.store(through_ptr + ((chunk + i) * num_value_heads + head) * K + dim_K, b_through, mask=dim_K < K)
        b_grad_key = tl.dot(b_v, b_grad_state.to(dtype), input_precision=PRECISION) * write_C[:, None]
        store_rows(grad_key_ptr, position_C, valid_C, head, num_value_heads, dim_K, K, b_grad_key)
        b_grad_query = tl.dot(b_grad_o, b_state, input_precision=PRECISION)
        # Before it is scaled by read: o is linear in read, so read's gradient is the product with the unscaled output.
        read_partial_C = tl.sum(b_query.to(tl.float32) * b_grad_query, 1)
        b_grad_query *= read_C[:, None]
        store_rows(grad_query_ptr, position_C, valid_C, head, num_value_heads, dim_K, K, b_grad_query)
        # The scores' gradient does not depend on the block of K, so only one program per piece and head computes it.
        if block == 0:
            b_scores = load_rows(scores_ptr, position_C, valid_C, key_head, num_heads, dim_C, CHUNK)
            write_1C = tl.where(valid_C, write_C, 0.0)[None, :]
            b_grad_scores = tl.dot(b_grad_o, tl.trans(b_v), input_precision=PRECISION) * write_1C
            b_grad_scores = tl.where(pairs_inside(CHUNK, CHUNK), b_grad_scores, 0.0)
            read_partial_C += tl.sum(b_scores.to(tl.float32) * b_grad_scores, 1)
            b_grad_scores *= read_C[:, None]
            store_rows(grad_scores_ptr, position_C, valid_C, head, num_value_heads, dim_C, CHUNK, b_grad_scores)
        offset_C = (row_C.to(tl.int64) * num_value_heads + head) * blocks + block
        tl.store(read_partial_ptr + offset_C, read_partial_C, mask=valid_C)
        b_query = (b_query.to(tl.float32) * read_C[:, None]).to(dtype)
        b_grad_state = tl.dot(tl.trans(b_grad_o), b_query, b_grad_state * b_decay[None, :], input_precision=PRECISION)


@triton.jit
def gla_values_kernel(
    query_ptr,
    key_ptr,
    scores_ptr,
    decay_ptr,
    v_ptr,
    grad_o_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    piece_start_ptr,
    piece_end_ptr,
    chunk_ptr,
    grad_leaving_ptr,
    grad_v_ptr,
    write_partial_ptr,
    num_heads,
    num_value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute gradients of the values [R, HV, V] and partial sums of write's gradient [R, HV, blocks of V], by row.

    Program (piece and block of V, value head), with all of K; it walks backwards over the piece.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    piece, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    key_head = head // (num_value_heads // num_heads)
    dim_K, dim_V, dim_C = tl.arange(0, BLOCK_K), block * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, CHUNK)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    if end <= start:
        return
    chunk = tl.load(chunk_ptr + piece)
    offset_KV, mask_KV = state_offsets(piece, head, num_value_heads, dim_K, dim_V, K, V)
    b_grad_state = tl.load(grad_leaving_ptr + offset_KV, mask=mask_KV, other=0.0)
    dtype = v_ptr.dtype.element_ty
    num_chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for back in range(0, num_chunks):
        i = num_chunks - 1 - back
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
        b_grad_o = load_rows(grad_o_ptr, row_C, token_C >= 0, head, num_value_heads, dim_V, V)
        offset_K = ((chunk + i) * num_heads + key_head) * K + dim_K
        b_decay = tl.load(decay_ptr + offset_K, mask=dim_K < K, other=0.0)

        b_grad_o = (b_grad_o.to(tl.float32) * read_C[:, None]).to(dtype)
        # Values reach the loss through the leaving state and through later rows of the chunk.
        b_grad_v = tl.dot(b_key, b_grad_state.to(dtype), input_precision=PRECISION)
        b_grad_v = tl.dot(tl.trans(b_scores), b_grad_o, b_grad_v, input_precision=PRECISION)
        offset_C = (row_C.to(tl.int64) * num_value_heads + head) * blocks + block
        tl.store(write_partial_ptr + offset_C, tl.sum(b_v.to(tl.float32) * b_grad_v, 1), mask=valid_C)
        store_rows(grad_v_ptr, row_C, valid_C, head, num_value_heads, dim_V, V, b_grad_v * write_C[:, None])
        b_grad_state = tl.dot(tl.trans(b_query), b_grad_o, b_grad_state * b_decay[:, None], input_precision=PRECISION)
