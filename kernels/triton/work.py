"""The bytes and operations of the kernels, counted from sizes, for rooflines: those of one forward and backward."""

import torch

from megatron_sse.chunking import CHUNK_SIZE


def gla_work(
    num_rows: int, num_heads: int, num_value_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Return bytes (each tensor once) and FLOPs of matrix products, by kernel, summed over forward and backward.

    All chunks count as full; the states of pieces are left out. With K = V = 128, as many value heads as key heads and
    bf16, a chunk of one head moves 240 KB forward and 616 KB backward.
    """
    # For that chunk of 64 rows: keys and values are 16 KB each, gates (fp32) 32, scores 8, states 32. Forward reads and
    # writes 64 (summarize) + 104 (prepare) + 72 (output) = 240 KB.
    size, rows = dtype.itemsize, num_rows
    chunks = -(-rows // CHUNK_SIZE)
    keys, values = rows * num_heads * key_dim * size, rows * num_value_heads * value_dim * size
    gates, scores = rows * num_heads * key_dim * 4, rows * num_heads * CHUNK_SIZE * size
    inner_keys, inner_scores = (x * num_value_heads // num_heads for x in (keys, scores))
    states = chunks * num_value_heads * key_dim * value_dim * size
    # FLOPs: a row of K (or V) elements times the state [K, V], and a chunk's [C, C] matrix times its keys or values.
    with_state = 2 * rows * num_value_heads * key_dim * value_dim
    with_keys, with_values = (2 * rows * CHUNK_SIZE * x for x in (num_heads * key_dim, num_value_heads * value_dim))
    return {
        # These two run twice: summarize in both directions, prepare again in backward (its results are not kept).
        "gla_summarize_kernel": (2 * (keys + gates + values), 2 * with_state),
        "gla_prepare_kernel": (2 * (4 * keys + gates + scores), 2 * with_keys),
        "gla_output_kernel": (2 * keys + scores + 2 * values, 2 * with_state + with_values),
        "gla_values_kernel": (2 * keys + scores + 3 * values, 2 * with_state + with_values),
        "gla_states_kernel": (keys + values + states, with_state),
        "gla_inter_kernel": (
            keys + scores + 2 * values + states + 2 * inner_keys + inner_scores,
            3 * with_state + with_values,
        ),
        "gla_intra_kernel": (4 * keys + 2 * gates + 2 * inner_keys + inner_scores, 2 * with_keys),
    }


def gdn_work(
    num_rows: int, num_value_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Return bytes (each tensor once; k and q once per value head) and FLOPs of matrix products, by kernel.

    They are summed over forward and backward. All chunks count as full; the states of pieces and the kernels of the
    gates are left out.
    """
    size, rows = dtype.itemsize, num_rows * num_value_heads
    keys, values, pairs = rows * key_dim * size, rows * value_dim * size, rows * CHUNK_SIZE * size
    states = rows // CHUNK_SIZE * key_dim * value_dim * size
    with_state, square = 2 * rows * key_dim * value_dim, 2 * rows * key_dim * key_dim
    with_keys, with_values = 2 * rows * CHUNK_SIZE * key_dim, 2 * rows * CHUNK_SIZE * value_dim
    summarize = 2 * (with_state + square) + with_values + with_keys
    # `attend`: once for the outputs. `again`: once more in backward, for the states and what is written (STORE).
    attend, again = 3 * with_state + 2 * with_values, 2 * with_state + with_values
    return {
        # Runs twice: its results are not kept for backward.
        "gdn_prepare_kernel": (2 * (2 * keys + 2 * pairs), 4 * with_keys),
        "gdn_summarize_kernel": (keys + values + pairs, summarize),
        "gdn_attend_kernel": (3 * keys + 4 * values + 3 * pairs + states, attend + again),
        "gdn_states_backward_kernel": (4 * keys + 3 * values + 4 * pairs + states, 2 * attend),
        "gdn_scores_backward_kernel": (keys + 5 * values + 3 * pairs, 4 * with_values + with_keys),
        "gdn_keys_backward_kernel": (4 * keys + 3 * values + 2 * pairs + 2 * states, 3 * with_state + 4 * with_keys),
    }
