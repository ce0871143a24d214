"""Gated linear attention over the rows of several banks, as four operators; the caller scans between pieces.

Every operator takes the same inputs first (R rows, T tokens, H key heads, HV value heads, G chunks, M pieces):
    q1, k1, q2, k2 [T, H, K]: queries and keys of the shared bank (1) and of the partitions (2); v [T, HV, V].
    g1, g2 [T, H, K]: log decays, fp32, <= 0.
    writes_R, write_R, read_R: fp32, by row; they multiply the log decays, the values written, and the outputs. Rows at
        which a document starts have writes of 0: what resets do is masked by the runs.
    row_R, token_R, run_R: int32; chunk_start_G, chunk_end_G, piece_start_M, piece_end_M, chunk_M: int64; see
        triton_rows.Rows.
    num_tokens: chunks and pieces that start at this position or later belong to partitions.
All are contiguous. States and their gradients are fp32; q, k, v, outputs and the tensors between kernels share one
dtype.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.triton.gla_backward import gla_inter_kernel, gla_states_kernel, gla_values_kernel
from megatron_sse.kernels.triton.gla_forward import gla_output_kernel, gla_prepare_kernel, gla_summarize_kernel
from megatron_sse.kernels.triton.gla_intra import gla_intra_kernel
from megatron_sse.kernels.triton.gla_steep import gla_steep_scores_kernel
from megatron_sse.kernels.triton.target import HOPPER, SHARED_LIMIT, Target, target_of

# For each kernel, three settings: for 16-bit inputs with dims up to 128, for 16-bit inputs with larger dims, and for
# fp32. A setting is the largest block of K and of V (None: all of it), warps, stages, and a limit on registers (None:
# no limit). Chosen so that nothing spills in 16 bits up to a dim of 128, and shared memory stays below 112 KiB, so that
# two programs of 4 warps fit on a Hopper multiprocessor.
_TILES = {
    gla_summarize_kernel: ((64, 128, 16, 3, None), (64, 128, 16, 3, None), (64, 64, 8, 1, None)),
    gla_prepare_kernel: ((64, None, 8, 1, 128), (64, None, 8, 1, 128), (32, None, 4, 1, None)),
    gla_steep_scores_kernel: ((32, None, 8, 1, None), (32, None, 8, 1, None), (16, None, 8, 1, None)),
    gla_output_kernel: ((None, 64, 4, 3, None), (None, 64, 8, 1, None), (None, 32, 4, 1, None)),
    gla_states_kernel: ((64, 128, 8, 3, None), (64, 128, 8, 3, None), (64, 64, 8, 1, None)),
    gla_inter_kernel: ((64, None, 8, 3, None), (64, None, 8, 1, None), (32, None, 8, 1, None)),
    gla_values_kernel: ((None, 64, 4, 3, None), (None, 64, 8, 1, None), (None, 32, 4, 1, None)),
    gla_intra_kernel: ((64, None, 16, 1, None), (64, None, 16, 1, None), (32, None, 8, 1, None)),
}
# What differs where shared memory is small and matrix products take their operands from registers: before Hopper, and
# on sm_120.
_AMPERE_TILES = {
    gla_summarize_kernel: ((32, 128, 8, 3, None), (32, 128, 8, 3, None)),
    gla_output_kernel: ((None, 32, 4, 3, None), (None, 32, 8, 1, None)),
    gla_inter_kernel: ((16, None, 8, 3, None), (16, None, 8, 1, None)),
    gla_values_kernel: ((None, 32, 4, 3, None), (None, 32, 8, 1, None)),
    gla_intra_kernel: ((32, None, 8, 1, None), (32, None, 8, 1, None)),
}
# What differs after Hopper, where a matrix product is computed by 4 or 8 warps.
_BLACKWELL_TILES = {
    gla_summarize_kernel: ((64, 128, 8, 3, None), (64, 128, 8, 3, None)),
    gla_inter_kernel: ((32, None, 8, 3, None), (32, None, 8, 1, None)),
    gla_intra_kernel: ((32, None, 8, 1, None), (32, None, 8, 1, None)),
}
_STEEP_TILES = {gla_intra_kernel: ((16, None, 8, 1, None), (16, None, 8, 1, None), (16, None, 8, 1, None))}
# Kernels in which one program loops over all blocks of K.
_WITH_ALL_BLOCKS = (gla_prepare_kernel, gla_steep_scores_kernel)
# Kernels that are compiled in two variants, and the constant that selects the variant.
_VARIANTS = {gla_summarize_kernel: "REVERSE", gla_intra_kernel: "STEEP"}
# A sum of log decays above minus this number may be exponentiated with either sign. Below it the chunk is steep:
# exp(-sum) would overflow in fp16, or cost digits in fp32.
MILD = {torch.bfloat16: 40.0, torch.float16: 6.0, torch.float32: 8.0}
_POINTERS = {
    "*i32": ("row", "token", "run", "steep"),
    "*i64": ("chunk_start", "chunk_end", "piece_start", "piece_end", "chunk"),
    "*fp32": (
        *("g1", "g2", "grad_g", "writes", "write", "read", "factor", "decay", "through"),
        *("transition", "state", "entering", "grad_leaving", "read_partial", "write_partial"),
    ),
}


@functools.cache
def _configure(
    kernel, key_dim: int, value_dim: int, groups: int, dtype: torch.dtype, variant: bool, target: Target
) -> tuple[dict, dict]:
    """Return a kernel's constants and its launch options on a GPU."""
    column = 2 if dtype == torch.float32 else int(max(key_dim, value_dim) > 128)
    tiles: tuple = _TILES[kernel]
    if variant and kernel in _STEEP_TILES:
        tiles = _STEEP_TILES[kernel]
    elif column < 2 and target.arch != HOPPER.arch:
        tiles = (_BLACKWELL_TILES if target.is_large else _AMPERE_TILES).get(kernel, tiles)
    block_k, block_v, num_warps, num_stages, max_registers = tiles[column]
    constants = {
        # Forward, summarize reads keys, which are not scaled; its variant and all other kernels read queries.
        "SCALE": 1.0 if kernel is gla_summarize_kernel and not variant else key_dim**-0.5,
        "K": key_dim,
        "V": value_dim,
        "GROUPS": groups,
        "BLOCK_K": _block(key_dim, block_k),
        "BLOCK_V": _block(value_dim, block_v),
        "CHUNK": CHUNK_SIZE,
        "MILD": MILD[dtype],
        "REVERSE": variant,
        "STEEP": variant,
        # Three tf32 products are as exact as one in fp32 and run on tensor cores; plain fp32 spills kilobytes.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return used, options if max_registers is None else options | {"maxnreg": max_registers}


def _block(dim: int, largest: int | None) -> int:
    block = max(16, triton.next_power_of_2(dim))
    return block if largest is None else min(block, largest)


def compile_cases(arch: int) -> list[tuple]:
    """Return (kernel, signature, constants, options) of everything that the operators launch at common sizes."""
    cases, target = [], Target(arch, SHARED_LIMIT[arch])
    types = {f"{name}_ptr": kind for kind, names in _POINTERS.items() for name in names}
    for dtype, inputs in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for dim in (64, 128, 256):
            for kernel in _TILES:
                for variant in (False, True) if kernel in _VARIANTS else (False,):
                    constants, options = _configure(kernel, dim, dim, 1, dtype, variant, target)
                    types_of_rest = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
                    signature = {
                        name: types.get(name, inputs) if name.endswith("_ptr") else types_of_rest[name]
                        for name in kernel.arg_names
                    }
                    cases.append((kernel, signature, constants, options))
    return cases


def _configure_for(kernel, x: dict, variant: bool = False) -> tuple[dict, dict]:
    num_heads, key_dim = x["q1"].shape[1:]
    num_value_heads, value_dim = x["v"].shape[1:]
    groups = num_value_heads // num_heads
    return _configure(kernel, key_dim, value_dim, groups, x["v"].dtype, variant, target_of(x["v"].device))


def _count_blocks(constants: dict) -> int:
    """Return how many programs share a head's state: blocks of K times blocks of V."""
    return math.prod(triton.cdiv(constants[dim], constants[f"BLOCK_{dim}"]) for dim in "KV" if dim in constants)


def _launch(kernel, places: int, x: dict[str, Any], variant: bool = False) -> None:
    """Launch a kernel on the grid (places * blocks, heads); arguments are taken from `x` by name.

    places: the number of chunks or pieces. Program (i, h) has place i // blocks, block i % blocks and head h: a value
    head where the kernel knows of value heads, otherwise a key head.
    """
    constants, options = _configure_for(kernel, x, variant)
    blocks = 1 if kernel in _WITH_ALL_BLOCKS else _count_blocks(constants)
    heads = {"num_heads": x["q1"].shape[1], "num_value_heads": x["v"].shape[1]}
    x = x | heads
    arguments = {name: x[name.removesuffix("_ptr")] for name in kernel.arg_names if name not in constants}
    num_heads = max(count for name, count in heads.items() if name in arguments)
    kernel[places * blocks, num_heads](**arguments, **constants, **options)


_INPUTS = (
    *("q1", "k1", "g1", "q2", "k2", "g2", "v", "writes", "write", "read", "row", "token", "run"),
    *("chunk_start", "chunk_end", "piece_start", "piece_end", "chunk", "num_tokens"),
)
_SCHEMA = ", ".join(f"Tensor {name}" for name in _INPUTS[:-1]) + ", SymInt num_tokens"


def _named(inputs: Sequence) -> dict[str, Any]:
    return dict(zip(_INPUTS, inputs, strict=True))


def _empty_states(x: dict) -> Tensor:
    """Return an uninitialised state for each piece, fp32 [M, HV, K, V]."""
    shape = (x["piece_start"].shape[0], x["v"].shape[1], x["q1"].shape[2], x["v"].shape[2])
    return x["v"].new_empty(shape, dtype=torch.float32)


def _empty_summary(*inputs) -> tuple[Tensor, Tensor]:
    increment = _empty_states(_named(inputs))
    return increment.new_empty(*increment.shape[:-1], 1), increment


@torch.library.custom_op("megatron_sse::gla_summarize", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def gla_summarize(*inputs):
    """Return what each piece does to the state that enters it: transition [M, HV, K, 1], increment [M, HV, K, V]."""
    x = _named(inputs)
    transition, increment = _empty_summary(*inputs)
    x |= {"x1": x["k1"], "x2": x["k2"], "y": x["v"], "factor": x["write"], "transition": transition, "state": increment}
    _launch(gla_summarize_kernel, len(increment), x)
    return transition, increment


gla_summarize.register_fake(_empty_summary)


@torch.library.custom_op(
    "megatron_sse::gla_summarize_backward", mutates_args=(), schema=f"({_SCHEMA}, Tensor grad_o) -> Tensor"
)
def gla_summarize_backward(*inputs):
    """Return the gradients [M, HV, K, V] of the states that enter the pieces, through each piece's own outputs.

    The last input is the gradient of the outputs, grad_o [R, HV, V].
    """
    *inputs, grad_o = inputs
    x = _named(inputs)
    grad_entering = _empty_states(x)
    x |= {"x1": x["q1"], "x2": x["q2"], "y": grad_o.contiguous(), "factor": x["read"]}
    x |= {"transition": grad_entering, "state": grad_entering}
    _launch(gla_summarize_kernel, len(grad_entering), x, variant=True)
    return grad_entering


gla_summarize_backward.register_fake(lambda *inputs: _empty_states(_named(inputs[:-1])))


_PREPARED = ("query", "key", "scores", "decay", "steep")
_PREPARED_SCHEMA = ", ".join(f"Tensor {name}" for name in _PREPARED)


def _empty_prepared(*inputs) -> tuple[Tensor, ...]:
    x = _named(inputs)
    num_rows, num_chunks = x["row"].shape[0], x["chunk_start"].shape[0]
    num_heads, key_dim = x["q1"].shape[1:]
    new_empty = x["v"].new_empty
    return (
        new_empty(num_rows, num_heads, key_dim),
        new_empty(num_rows, num_heads, key_dim),
        new_empty(num_rows, num_heads, CHUNK_SIZE),
        new_empty(num_chunks, num_heads, key_dim, dtype=torch.float32),
        new_empty(num_chunks, num_heads, dtype=torch.int32),
    )


@torch.library.custom_op(
    "megatron_sse::gla_prepare",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gla_prepare(*inputs):
    """Return what the outputs need besides the entering states.

    These are decayed queries and keys [R, H, K] and scores [R, H, C], all by sorted position, the chunks' decays
    [G, H, K], and whether chunks are steep, int32 [G, H].
    """
    prepared = _empty_prepared(*inputs)
    x = _named(inputs) | dict(zip(_PREPARED, prepared, strict=True))
    num_chunks = x["chunk_start"].shape[0]
    _launch(gla_prepare_kernel, num_chunks, x)
    _launch(gla_steep_scores_kernel, num_chunks, x)
    return prepared


gla_prepare.register_fake(_empty_prepared)


@torch.library.custom_op(
    "megatron_sse::gla_attend", mutates_args=(), schema=f"({_SCHEMA}, {_PREPARED_SCHEMA}, Tensor entering) -> Tensor"
)
def gla_attend(*inputs):
    """Return the outputs [R, HV, V] by row, given what gla_prepare returns and the states [M, HV, K, V] that enter."""
    x, entering = _named_with_prepared(inputs)
    o = _empty_rows(x, x["v"])
    _launch(gla_output_kernel, len(entering), x | {"entering": entering.contiguous(), "o": o})
    return o


def _named_with_prepared(inputs: Sequence) -> tuple[dict[str, Any], Any]:
    """Return the inputs and what is prepared by name, and the last input."""
    first = len(_INPUTS)
    return _named(inputs[:first]) | dict(zip(_PREPARED, inputs[first:-1], strict=True)), inputs[-1]


@gla_attend.register_fake
def _(*inputs):
    x, _ = _named_with_prepared(inputs)
    return _empty_rows(x, x["v"])


def _empty_rows(x: dict, like: Tensor) -> Tensor:
    """Return an uninitialised [R, ...] for a `like` of [T, ...]."""
    return like.new_empty(x["row"].shape[0], *like.shape[1:])


def _empty_chunk_states(*inputs) -> Tensor:
    x, _ = _named_with_prepared(inputs)
    key_dim, (_, num_value_heads, value_dim) = x["q1"].shape[2], x["v"].shape
    return x["v"].new_empty(x["chunk_start"].shape[0], num_value_heads, key_dim, value_dim)


@torch.library.custom_op(
    "megatron_sse::gla_chunk_states",
    mutates_args=(),
    schema=f"({_SCHEMA}, {_PREPARED_SCHEMA}, Tensor entering) -> Tensor",
)
def gla_chunk_states(*inputs):
    """Return the states that enter the chunks [G, HV, K, V], in v's dtype, given those that enter the pieces."""
    x, entering = _named_with_prepared(inputs)
    chunk_states = _empty_chunk_states(*inputs)
    _launch(gla_states_kernel, len(entering), x | {"entering": entering.contiguous(), "chunk_states": chunk_states})
    return chunk_states


gla_chunk_states.register_fake(_empty_chunk_states)


def gla_again(*inputs) -> tuple[Tensor, ...]:
    """Return what the backward pass needs of the forward pass, for gla_attend_backward.

    The last input is the states [M, HV, K, V] that enter the pieces.
    """
    *arguments, entering = inputs
    prepared = gla_prepare(*arguments)
    return *prepared, gla_chunk_states(*arguments, *prepared, entering)


@torch.library.custom_op(
    "megatron_sse::gla_attend_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, {_PREPARED_SCHEMA}, Tensor chunk_states, Tensor grad_o, Tensor grad_leaving)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gla_attend_backward(*inputs):
    """Return the gradients by row: q, k, g [R, H, K], v [R, HV, V], write, read [R].

    The last inputs are what gla_again returns, grad_o [R, HV, V], and the full gradient of the states that leave the
    pieces [M, HV, K, V].
    """
    *inputs, grad_o, grad_leaving = inputs
    x, chunk_states = _named_with_prepared(inputs)
    x |= {"chunk_states": chunk_states, "grad_o": grad_o.contiguous(), "grad_leaving": grad_leaving.contiguous()}
    grads = dict(zip(("grad_q", "grad_k", "grad_g", "grad_v"), _empty_gradients(x), strict=True))
    num_pieces, num_chunks, num_rows = len(grad_leaving), x["chunk_start"].shape[0], x["row"].shape[0]
    num_value_heads, key_dim = x["v"].shape[1], x["q1"].shape[2]
    new_empty = x["v"].new_empty

    write_partial = new_empty(
        num_rows, num_value_heads, _count_blocks(_configure_for(gla_values_kernel, x)[0]), dtype=torch.float32
    )
    _launch(gla_values_kernel, num_pieces, x | grads | {"write_partial": write_partial})

    read_partial = new_empty(
        num_rows, num_value_heads, _count_blocks(_configure_for(gla_inter_kernel, x)[0]), dtype=torch.float32
    )
    inner = {
        "grad_query": new_empty(num_rows, num_value_heads, key_dim),
        "grad_key": new_empty(num_rows, num_value_heads, key_dim),
        "grad_scores": new_empty(num_rows, num_value_heads, CHUNK_SIZE),
        "through": new_empty(num_chunks, num_value_heads, key_dim, dtype=torch.float32),
    }
    _launch(gla_inter_kernel, num_pieces, x | inner | {"read_partial": read_partial})
    for steep in (False, True):
        _launch(gla_intra_kernel, num_chunks, x | inner | grads, variant=steep)
    return *grads.values(), write_partial.sum((1, 2)), read_partial.sum((1, 2))


def _empty_gradients(x: dict) -> tuple[Tensor, ...]:
    return tuple(_empty_rows(x, x[name]) for name in ("q1", "k1", "g1", "v"))


@gla_attend_backward.register_fake
def _(*inputs):
    x, _ = _named_with_prepared(inputs[:-2])
    return *_empty_gradients(x), torch.empty_like(x["write"]), torch.empty_like(x["read"])
