"""Gated linear attention over the rows of several banks, as four operators; the scan between pieces is the caller's.

Every operator takes the same inputs first (R rows, T tokens, H key heads, HV value heads, G chunks, M pieces):
    q1, k1, q2, k2 [T, H, K]: queries and keys as the shared bank and as the partitions see them; v [T, HV, V].
    g1, g2 [T, H, K]: log decays, fp32, <= 0.
    writes_R, write_R, read_R: fp32, by row; they multiply the log decays, what is written, and the outputs.
    row_R, token_R: int32; chunk_start_G, chunk_end_G, piece_start_M, piece_end_M, chunk_M: int64; see rows.Rows.
    num_tokens: chunks and pieces that start at this position or later belong to partitions.
States and their gradients are fp32; q, k, v, outputs and what passes between kernels have v's dtype.
"""

import torch
import triton
from torch import Tensor

from megatron_sse.kernels.triton.gla_forward import gla_output_kernel, gla_prepare_kernel, gla_summarize_kernel
from megatron_sse.kernels.triton.rows import CHUNK_SIZE

# Per kernel: the largest blocks of K and V (None: all of it), warps and stages, for 16-bit inputs and for fp32.
_TILES = {
    gla_summarize_kernel: ((64, 128, 4, 2), (64, 64, 4, 2)),
    gla_prepare_kernel: ((64, None, 4, 1), (32, None, 4, 1)),
    gla_output_kernel: ((None, 64, 4, 2), (None, 32, 4, 1)),
}
# Sums of log decays above minus this many may be exponentiated with either sign: fp16 overflows, fp32 loses digits.
_MILD = {torch.bfloat16: 40.0, torch.float16: 6.0, torch.float32: 8.0}
_INT32 = ("row_ptr", "token_ptr")
_INT64 = ("chunk_start_ptr", "chunk_end_ptr", "piece_start_ptr", "piece_end_ptr", "chunk_ptr")
_FLOAT32 = ("g1_ptr", "g2_ptr", "writes_ptr", "write_ptr", "read_ptr", "factor_ptr", "transition_ptr", "state_ptr")
_FLOAT32 += ("entering_ptr", "decay_ptr")


def _configure(kernel, key_dim: int, value_dim: int, dtype: torch.dtype, reverse: bool = False) -> tuple[dict, dict]:
    """A kernel's constants, and its warps and stages."""
    block_k, block_v, num_warps, num_stages = _TILES[kernel][dtype == torch.float32]
    constants = {
        "SCALE": key_dim**-0.5 if reverse or kernel is not gla_summarize_kernel else 1.0,
        "K": key_dim,
        "V": value_dim,
        "BLOCK_K": _block(key_dim, block_k),
        "BLOCK_V": _block(value_dim, block_v),
        "CHUNK": CHUNK_SIZE,
        "MILD": _MILD[dtype],
        "REVERSE": reverse,
    }
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return used, {"num_warps": num_warps, "num_stages": num_stages}


def _block(dim: int, largest: int | None) -> int:
    block = max(16, triton.next_power_of_2(dim))
    return block if largest is None else min(block, largest)


def compile_cases() -> list[tuple]:
    """What is compiled ahead: (kernel, signature, constants, options), as the operators launch them."""
    cases = []
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for dim in (64, 128, 256):
            for kernel in _TILES:
                for reverse in (False, True) if kernel is gla_summarize_kernel else (False,):
                    constants, options = _configure(kernel, dim, dim, dtype, reverse)
                    signature = {x: _type(x, constants, name) for x in kernel.arg_names}
                    cases.append((kernel, signature, constants, options))
    return cases


def _type(argument: str, constants: dict, inputs: str) -> str:
    if argument in constants:
        return "constexpr"
    if not argument.endswith("_ptr"):
        return "i32"
    known = dict.fromkeys(_INT32, "*i32") | dict.fromkeys(_INT64, "*i64") | dict.fromkeys(_FLOAT32, "*fp32")
    return known.get(argument, inputs)


@torch.library.custom_op("megatron_sse::gla_summarize", mutates_args=())
def gla_summarize(
    q1: Tensor,
    k1: Tensor,
    g1: Tensor,
    q2: Tensor,
    k2: Tensor,
    g2: Tensor,
    v: Tensor,
    writes_R: Tensor,
    write_R: Tensor,
    read_R: Tensor,
    row_R: Tensor,
    token_R: Tensor,
    chunk_start_G: Tensor,
    chunk_end_G: Tensor,
    piece_start_M: Tensor,
    piece_end_M: Tensor,
    chunk_M: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """What each piece does to the state that enters it: transition [M, HV, K, 1] and increment [M, HV, K, V]."""
    num_pieces, num_heads, key_dim = piece_start_M.shape[0], *k1.shape[1:]
    num_value_heads, value_dim = v.shape[1:]
    transition = v.new_empty(num_pieces, num_value_heads, key_dim, 1, dtype=torch.float32)
    increment = v.new_empty(num_pieces, num_value_heads, key_dim, value_dim, dtype=torch.float32)
    constants, options = _configure(gla_summarize_kernel, key_dim, value_dim, v.dtype)
    blocks = triton.cdiv(key_dim, constants["BLOCK_K"]) * triton.cdiv(value_dim, constants["BLOCK_V"])
    tables = (row_R, token_R, piece_start_M, piece_end_M)
    gla_summarize_kernel[num_pieces * blocks, num_value_heads](
        *(k1, k2, g1, g2, v, writes_R, write_R, *tables, transition, increment),
        *(num_tokens, num_heads, num_value_heads),
        **constants,
        **options,
    )
    return transition, increment


@gla_summarize.register_fake
def _(q1, k1, g1, q2, k2, g2, v, writes_R, write_R, read_R, row_R, token_R, *tables):
    num_pieces, num_value_heads, value_dim, key_dim = tables[2].shape[0], *v.shape[1:], k1.shape[2]
    transition = v.new_empty(num_pieces, num_value_heads, key_dim, 1, dtype=torch.float32)
    return transition, v.new_empty(num_pieces, num_value_heads, key_dim, value_dim, dtype=torch.float32)


@torch.library.custom_op("megatron_sse::gla_attend", mutates_args=())
def gla_attend(
    q1: Tensor,
    k1: Tensor,
    g1: Tensor,
    q2: Tensor,
    k2: Tensor,
    g2: Tensor,
    v: Tensor,
    writes_R: Tensor,
    write_R: Tensor,
    read_R: Tensor,
    row_R: Tensor,
    token_R: Tensor,
    chunk_start_G: Tensor,
    chunk_end_G: Tensor,
    piece_start_M: Tensor,
    piece_end_M: Tensor,
    chunk_M: Tensor,
    num_tokens: int,
    entering_M: Tensor,
) -> Tensor:
    """Outputs [R, HV, V] by row, given the states [M, HV, K, V] that enter the pieces."""
    banks = (q1, k1, g1, q2, k2, g2)
    query, key, scores, decay = _prepare(banks, v, writes_R, row_R, token_R, chunk_start_G, chunk_end_G, num_tokens)
    num_value_heads, value_dim = v.shape[1:]
    o = v.new_empty(row_R.shape[0], num_value_heads, value_dim)
    constants, options = _configure(gla_output_kernel, q1.shape[2], value_dim, v.dtype)
    tables = (row_R, token_R, piece_start_M, piece_end_M, chunk_M)
    grid = (piece_start_M.shape[0] * triton.cdiv(value_dim, constants["BLOCK_V"]), num_value_heads)
    gla_output_kernel[grid](
        *(query, key, scores, decay, v, write_R, read_R, *tables, entering_M.contiguous(), o),
        *(q1.shape[1], num_value_heads),
        **constants,
        **options,
    )
    return o


@gla_attend.register_fake
def _(q1, k1, g1, q2, k2, g2, v, writes_R, *rest):
    return v.new_empty(writes_R.shape[0], *v.shape[1:])


def _prepare(banks, v, writes_R, row_R, token_R, chunk_start_G, chunk_end_G, num_tokens):
    """Decayed queries and keys [R, H, K] and scores [R, H, C] by position, in v's dtype; decays [G, H, K] of chunks."""
    num_heads, key_dim = banks[0].shape[1:]
    num_rows, num_chunks = row_R.shape[0], chunk_start_G.shape[0]
    query, key = (v.new_empty(num_rows, num_heads, key_dim) for _ in range(2))
    scores = v.new_empty(num_rows, num_heads, CHUNK_SIZE)
    decay = v.new_empty(num_chunks, num_heads, key_dim, dtype=torch.float32)
    constants, options = _configure(gla_prepare_kernel, key_dim, v.shape[2], v.dtype)
    tables = (row_R, token_R, chunk_start_G, chunk_end_G)
    gla_prepare_kernel[num_chunks, num_heads](
        *(*banks, writes_R, *tables, query, key, scores, decay), num_tokens, num_heads, **constants, **options
    )
    return query, key, scores, decay
