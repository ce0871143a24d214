"""The gated delta rule over rows read through tables: the operators around the scan over pieces.

`inputs` and results hold rows at their own places (by token, by row); what is prepared holds them in sorted order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.triton import gdn_backward, gdn_forward
from megatron_sse.kernels.triton.target import SHARED_LIMIT, Target, target_of


class GdnInputs(NamedTuple):
    """The tensors that all operators read.

    q1_THK .. beta2_TH: of the shared bank (1) and of the sparse ones (2; the shared bank's again where there are none).
        q and k are normalised; g (log decay) and beta are fp32 per value head; KDA's g is [T, HV, K].
    v_THV: its number of heads is a multiple of the keys'; its dtype is that of all matrix products and of the output.
    writes_R, write_R, read_R: fp32, scales of g and beta (0 or 1), of v and of the output.
    row_R .. chunk_M: see Rows.
    """

    q1_THK: Tensor
    k1_THK: Tensor
    g1_TH: Tensor
    beta1_TH: Tensor
    q2_THK: Tensor
    k2_THK: Tensor
    g2_TH: Tensor
    beta2_TH: Tensor
    v_THV: Tensor
    writes_R: Tensor
    write_R: Tensor
    read_R: Tensor
    row_R: Tensor
    token_R: Tensor
    run_R: Tensor
    chunk_start_G: Tensor
    chunk_end_G: Tensor
    piece_start_M: Tensor
    piece_end_M: Tensor
    chunk_M: Tensor

    @property
    def dims(self) -> "Dims":
        """Heads, their dims and the dtype of products."""
        (_, num_heads, key_dim), (_, num_value_heads, value_dim) = self.q1_THK.shape, self.v_THV.shape
        return Dims(num_heads, num_value_heads, value_dim, key_dim, self.v_THV.dtype)

    def empty_states(self, like: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised state [HV, K, columns] for each element of `like`."""
        shape = (like.shape[0], self.dims.num_value_heads, self.dims.key_dim, columns)
        return self.v_THV.new_empty(shape, dtype=dtype)

    def empty_rows(self, *shape: int) -> Tensor:
        """Return an uninitialised array of `shape` for each head and row, [HV, R, *shape], rows in sorted order."""
        return self.v_THV.new_empty(self.dims.num_value_heads, self.row_R.shape[0], *shape)


@dataclass(frozen=True)
class Dims:
    """Heads, their dims, and the dtype of the matrix products."""

    num_heads: int
    num_value_heads: int
    value_dim: int
    key_dim: int
    dtype: torch.dtype


def _plan(kernel: triton.JITFunction, dims: Dims, target: Target) -> tuple[dict, dict]:
    """Return a kernel's constants and launch options.

    In fp32, products run without tensor cores and hold full operands in registers: hence small blocks and many warps.
    Where shared memory is small, tensor cores read from registers too, and two stages of 256 keys do not fit.
    """
    half, large = dims.dtype != torch.float32, target.is_large
    key_block, value_block = (max(16, triton.next_power_of_2(x)) for x in (dims.key_dim, dims.value_dim))
    key_part, value_part = (64, 64 if large or kernel in PER_CHUNK else 32) if half else (16, 16)
    constants = {
        "H": dims.num_heads,
        "HV": dims.num_value_heads,
        "BH": triton.next_power_of_2(dims.num_value_heads),
        "K": dims.key_dim,
        "V": dims.value_dim,
        "BK": key_block if kernel in PER_PIECE else min(key_block, key_part),
        "BV": min(value_block, value_part),
        "KEY_BLOCKS": triton.cdiv(dims.key_dim, min(key_block, key_part)),
        "SCALE": dims.key_dim**-0.5,
        "STORE": False,
        "C": CHUNK_SIZE,
    }
    options = {"num_warps": 4 if half else 8, "num_stages": 2 if half else 1}
    if kernel in PER_PIECE and key_block == 256:
        options = {"num_warps": 2 * options["num_warps"], "num_stages": options["num_stages"] if large else 1}
    return {name: x for name, x in constants.items() if name in kernel.arg_names}, options


PER_CHUNK = (
    gdn_forward.gdn_gates_kernel,
    gdn_forward.gdn_prepare_kernel,
    gdn_backward.gdn_scores_backward_kernel,
    gdn_backward.gdn_keys_backward_kernel,
    gdn_backward.gdn_gates_backward_kernel,
)
PER_PIECE = (
    gdn_forward.gdn_summarize_kernel,
    gdn_forward.gdn_attend_kernel,
    gdn_backward.gdn_states_backward_kernel,
)


def _launch(
    kernel: triton.JITFunction, inputs: GdnInputs, num_tokens: int, tensors: dict[str, Tensor], store: bool = False
) -> None:
    """Launch a kernel: a program for each chunk (PER_CHUNK) or piece (PER_PIECE), value head and block.

    The grid has one dimension, in which the block varies fastest, then the head: with 2 heads and 3 blocks, program 4
    is (chunk 0, head 1, block 1). `tensors`, like the inputs, are named as the kernel's pointers, with dims at the end.
    """
    dims = inputs.dims
    constants, options = _plan(kernel, dims, target_of(inputs.v_THV.device))
    if "STORE" in constants:
        constants["STORE"] = store
    named = {name.rpartition("_")[0] + "_ptr": x.contiguous() for name, x in (inputs._asdict() | tensors).items()}
    sizes = {"num_tokens": num_tokens, "num_rows": inputs.row_R.shape[0]}
    # Triton needs a pointer for every argument; one that this variant does not read or write may be any tensor.
    named = {name: named.get(name, inputs.v_THV) for name in kernel.arg_names if name.endswith("_ptr")}
    named |= {name: size for name, size in sizes.items() if name in kernel.arg_names}
    blocks = 1
    if kernel is gdn_backward.gdn_keys_backward_kernel:
        blocks = triton.cdiv(dims.key_dim, constants["BK"])
    if kernel in PER_PIECE:
        blocks = triton.cdiv(dims.value_dim, constants["BV"])
    # Blocks of columns of the increment [K, V] and then of the transition [K, K].
    if kernel is gdn_forward.gdn_summarize_kernel:
        blocks += triton.cdiv(dims.key_dim, constants["BV"])
    spans = inputs.piece_start_M if kernel in PER_PIECE else inputs.chunk_start_G
    heads = 1 if kernel is gdn_forward.gdn_gates_kernel else dims.num_value_heads
    num_programs = spans.shape[0] * heads * blocks
    if num_programs:
        kernel[(num_programs,)](**named, **constants, **options)


@torch.library.custom_op("megatron_sse::gdn_prepare", mutates_args=())
def gdn_prepare(inputs: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what needs no state: the chunks' inverses and scores [HV, R, C] in v's dtype, fp32 gates [4, HV, R]."""
    x = GdnInputs(*inputs)
    inverse_HRC, scores_HRC, gates_4HR = gdn_prepare_fake(inputs, num_tokens)
    prepared = {"inverse_HRC": inverse_HRC, "scores_HRC": scores_HRC, "gates_4HR": gates_4HR}
    _launch(gdn_forward.gdn_gates_kernel, x, num_tokens, prepared)
    _launch(gdn_forward.gdn_prepare_kernel, x, num_tokens, prepared)
    return inverse_HRC, scores_HRC, gates_4HR


@gdn_prepare.register_fake
def gdn_prepare_fake(inputs, num_tokens):
    x = GdnInputs(*inputs)
    gates_4HR = x.v_THV.new_empty(4, x.dims.num_value_heads, x.row_R.shape[0], dtype=torch.float32)
    return x.empty_rows(CHUNK_SIZE), x.empty_rows(CHUNK_SIZE), gates_4HR


@torch.library.custom_op("megatron_sse::gdn_summarize", mutates_args=())
def gdn_summarize(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what each piece does to the state that enters it: transition [M, HV, K, K], increment [M, HV, K, V]."""
    x = GdnInputs(*inputs)
    inverse_HRC, _, gates_4HR = prepared
    transition_MHKK, increment_MHKV = gdn_summarize_fake(inputs, num_tokens, prepared)
    results = {"transition_MHKK": transition_MHKK, "increment_MHKV": increment_MHKV}
    kernel = gdn_forward.gdn_summarize_kernel
    _launch(kernel, x, num_tokens, {"inverse_HRC": inverse_HRC, "gates_4HR": gates_4HR} | results)
    return transition_MHKK, increment_MHKV


@gdn_summarize.register_fake
def gdn_summarize_fake(inputs, num_tokens, prepared):
    x = GdnInputs(*inputs)
    return tuple(x.empty_states(x.piece_start_M, columns) for columns in (x.dims.key_dim, x.dims.value_dim))


@torch.library.custom_op("megatron_sse::gdn_attend", mutates_args=())
def gdn_attend(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor) -> Tensor:
    """Return the outputs [R, HV, V] in v's dtype, given the states that enter the pieces."""
    o_RHV = gdn_attend_fake(inputs, num_tokens, prepared, entering_MHKV)
    tensors = _named(prepared) | {"entering_MHKV": entering_MHKV, "o_RHV": o_RHV}
    _launch(gdn_forward.gdn_attend_kernel, GdnInputs(*inputs), num_tokens, tensors)
    return o_RHV


@gdn_attend.register_fake
def gdn_attend_fake(inputs, num_tokens, prepared, entering_MHKV):
    x = GdnInputs(*inputs)
    return x.v_THV.new_empty(x.row_R.shape[0], *x.v_THV.shape[1:])


def _named(prepared: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("inverse_HRC", "scores_HRC", "gates_4HR"), prepared, strict=True))


@torch.library.custom_op("megatron_sse::gdn_summarize_backward", mutates_args=())
def gdn_summarize_backward(
    inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], grad_o_RHV: Tensor
) -> Tensor:
    """Return the fp32 gradients [M, HV, K, V] of the states that enter the pieces, through each piece's own outputs."""
    grad_entering_MHKV = gdn_summarize_backward_fake(inputs, num_tokens, prepared, grad_o_RHV)
    tensors = _named(prepared) | {"grad_o_RHV": grad_o_RHV, "grad_entering_MHKV": grad_entering_MHKV}
    _launch(gdn_backward.gdn_states_backward_kernel, GdnInputs(*inputs), num_tokens, tensors)
    return grad_entering_MHKV


@gdn_summarize_backward.register_fake
def gdn_summarize_backward_fake(inputs, num_tokens, prepared, grad_o_RHV):
    x = GdnInputs(*inputs)
    return x.empty_states(x.piece_start_M, x.dims.value_dim)


@torch.library.custom_op("megatron_sse::gdn_again", mutates_args=())
def gdn_again(
    inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the backward pass needs of the forward pass, for gdn_attend_backward, in v's dtype.

    These are the states that enter the chunks [G, HV, K, V] and what is written, by sorted position [HV, R, V].
    """
    states_GHKV, d_HRV = gdn_again_fake(inputs, num_tokens, prepared, entering_MHKV)
    tensors = _named(prepared) | {"entering_MHKV": entering_MHKV, "states_GHKV": states_GHKV, "d_HRV": d_HRV}
    _launch(gdn_forward.gdn_attend_kernel, GdnInputs(*inputs), num_tokens, tensors, store=True)
    return states_GHKV, d_HRV


@gdn_again.register_fake
def gdn_again_fake(inputs, num_tokens, prepared, entering_MHKV):
    x = GdnInputs(*inputs)
    return x.empty_states(x.chunk_start_G, x.dims.value_dim, x.dims.dtype), x.empty_rows(x.dims.value_dim)


@torch.library.custom_op("megatron_sse::gdn_attend_backward", mutates_args=())
def gdn_attend_backward(
    inputs: Sequence[Tensor],
    num_tokens: int,
    prepared: Sequence[Tensor],
    again: Sequence[Tensor],
    grad_o_RHV: Tensor,
    grad_leaving_MHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by row: q, k [R, H, K], g, beta [R, HV], v [R, HV, V], write and read [R].

    Args:
        again: what gdn_again returns.
        grad_leaving_MHKV: the full gradients of the states that leave the pieces.
    """
    x = GdnInputs(*inputs)
    dims = x.dims
    tensors = _named(prepared) | dict(zip(("states_GHKV", "d_HRV"), again, strict=True))
    tensors |= {"grad_states_GHKV": torch.empty_like(again[0]), "grad_change_HRV": torch.empty_like(again[1])}
    tensors |= {"grad_o_RHV": grad_o_RHV, "grad_leaving_MHKV": grad_leaving_MHKV}
    _launch(gdn_backward.gdn_states_backward_kernel, x, num_tokens, tensors, store=True)

    gates_4HR = tensors["gates_4HR"]
    tensors |= {"grad_scores_HRC": x.empty_rows(CHUNK_SIZE), "grad_met_HRC": x.empty_rows(CHUNK_SIZE)}
    tensors["grad_gates_2HR"] = gates_4HR.new_empty(2, *gates_4HR.shape[1:])
    plan, _ = _plan(gdn_backward.gdn_gates_backward_kernel, dims, target_of(x.v_THV.device))
    tensors["sums_Z5HR"] = gates_4HR.new_empty(plan["KEY_BLOCKS"], 5, *gates_4HR.shape[1:])
    rows = x.row_R.shape[0]
    gradients = {"grad_q_RHK": x.q1_THK.new_empty(rows, dims.num_value_heads, dims.key_dim)}
    gradients["grad_k_RHK"] = x.k1_THK.new_empty(gradients["grad_q_RHK"].shape)
    gradients["grad_v_RHV"] = x.v_THV.new_empty(rows, *x.v_THV.shape[1:])
    for name in ("g", "beta", "write", "read"):
        gradients[f"grad_{name}_RH"] = gates_4HR.new_empty(rows, dims.num_value_heads)
    _launch(gdn_backward.gdn_scores_backward_kernel, x, num_tokens, tensors | gradients)
    _launch(gdn_backward.gdn_keys_backward_kernel, x, num_tokens, tensors | gradients)
    _launch(gdn_backward.gdn_gates_backward_kernel, x, num_tokens, tensors | gradients)

    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_write, grad_read = gradients.values()
    grad_q, grad_k = (sum_groups(grad, dims.num_heads) for grad in (grad_q, grad_k))
    return grad_q, grad_k, grad_g, grad_beta, grad_v, grad_write.sum(1), grad_read.sum(1)


@gdn_attend_backward.register_fake
def gdn_attend_backward_fake(inputs, num_tokens, prepared, again, grad_o_RHV, grad_leaving_MHKV):
    x = GdnInputs(*inputs)
    by_token = (x.q1_THK, x.k1_THK, x.g1_TH, x.beta1_TH, x.v_THV)
    rows = x.row_R.shape[0]
    return *(y.new_empty(rows, *y.shape[1:]) for y in by_token), *(y.new_empty(rows) for y in (x.write_R, x.read_R))


def sum_groups(x_RHK: Tensor, num_heads: int) -> Tensor:
    """Return the sums over the value heads that share a key head, [R, H, K]."""
    return x_RHK if x_RHK.shape[1] == num_heads else x_RHK.unflatten(1, (num_heads, -1)).sum(2)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict[str, str], dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    cases, target = [], Target(arch, SHARED_LIMIT[arch])
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128, 256):
            for kernel in PER_CHUNK + PER_PIECE:
                constants, options = _plan(kernel, Dims(8, 8, dim, dim, dtype), target)
                for store in (False, True) if "STORE" in constants else (None,):
                    variant = constants if store is None else constants | {"STORE": store}
                    cases.append((kernel, _signature(kernel, constants, dtype), variant, options))
    return cases


def _signature(kernel: triton.JITFunction, constants: dict, dtype: torch.dtype) -> dict[str, str]:
    """Return Triton's types of a kernel's arguments; those not named here are fp32."""
    of_products = "q1 k1 q2 k2 v inverse scores o states d grad_o grad_q grad_k grad_v"
    of_products += " grad_states grad_change grad_scores grad_met"
    tables = "chunk_start chunk_end piece_start piece_end chunk"
    products = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys((f"{name}_ptr" for name in of_products.split()), products)
    types |= dict.fromkeys((f"{name}_ptr" for name in tables.split()), "*i64") | {
        "row_ptr": "*i32",
        "token_ptr": "*i32",
        "run_ptr": "*i32",
    }
    types |= {"num_tokens": "i32", "num_rows": "i32"} | dict.fromkeys(constants, "constexpr")
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}
