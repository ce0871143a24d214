"""The delta rule with a decay per key channel, over rows read through tables: the operators around the scan.

They are called like those of gdn.py, with log decays [T, HV, K].
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.triton import kda_backward, kda_forward
from megatron_sse.kernels.triton.gdn import Dims, GdnInputs, sum_groups
from megatron_sse.kernels.triton.gla import MILD
from megatron_sse.kernels.triton.target import SHARED_LIMIT, Target, target_of

# What kda_prepare returns, in this order.
_PREPARED = "reading_HRK recalling_HRK keeping_HRK scores_HRC met_HRC inverse_HRC decay_GHK beta_HR".split()

PER_CHUNK = (
    kda_forward.kda_prepare_kernel,
    kda_backward.kda_scores_backward_kernel,
    kda_backward.kda_inter_kernel,
    kda_backward.kda_intra_kernel,
)
PER_PIECE = (
    kda_forward.kda_summarize_kernel,
    kda_forward.kda_attend_kernel,
    kda_backward.kda_states_backward_kernel,
)
# Kernels whose programs hold many tiles [C, K] at once, in 16 columns so that they do not spill.
_NARROW = (kda_forward.kda_prepare_kernel, kda_backward.kda_intra_kernel)


def _plan(kernel: triton.JITFunction, dims: Dims, target: Target) -> tuple[dict, dict]:
    """Return a kernel's constants and launch options; blocks are small where shared memory is, and in fp32."""
    half, large = dims.dtype != torch.float32, target.is_large
    key_block, value_block = (max(16, triton.next_power_of_2(x)) for x in (dims.key_dim, dims.value_dim))
    fits = kernel in PER_CHUNK or (large and key_block < 256)
    key_part, value_part = (64, 64 if fits else 32) if half else (16, 16)
    if kernel in _NARROW:
        key_part = 16
    constants = {
        "H": dims.num_heads,
        "HV": dims.num_value_heads,
        "K": dims.key_dim,
        "V": dims.value_dim,
        "BK": key_block if kernel in PER_PIECE else min(key_block, key_part),
        "BV": min(value_block, value_part),
        "SCALE": dims.key_dim**-0.5,
        "STORE": False,
        "MILD": MILD[dims.dtype],
        # As in gla.py: three tf32 products are as exact as one in fp32.
        "PRECISION": "ieee" if half else "tf32x3",
        "C": CHUNK_SIZE,
    }
    # Two stages of the states' kernels would take more than half of a Hopper core's shared memory.
    options = {"num_warps": 4 if kernel is kda_backward.kda_scores_backward_kernel else 8, "num_stages": 1}
    return {name: x for name, x in constants.items() if name in kernel.arg_names}, options


def _launch(
    kernel: triton.JITFunction, inputs: GdnInputs, num_tokens: int, tensors: dict[str, Tensor], store: bool = False
) -> None:
    """Launch a kernel: a program for each chunk or piece, value head and block, as in gdn.py."""
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
    if kernel is kda_backward.kda_intra_kernel:
        blocks = triton.cdiv(dims.key_dim, constants["BK"])
    if kernel in PER_PIECE:
        blocks = triton.cdiv(dims.value_dim, constants["BV"])
    # Blocks of columns of the increment [K, V] and then of the transition [K, K].
    if kernel is kda_forward.kda_summarize_kernel:
        blocks += triton.cdiv(dims.key_dim, constants["BV"])
    spans = inputs.piece_start_M if kernel in PER_PIECE else inputs.chunk_start_G
    num_programs = spans.shape[0] * dims.num_value_heads * blocks
    if num_programs:
        kernel[(num_programs,)](**named, **constants, **options)


def _named(prepared: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_PREPARED, prepared, strict=True))


@torch.library.custom_op("megatron_sse::kda_prepare", mutates_args=())
def kda_prepare(
    inputs: Sequence[Tensor], num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what needs no state, as kda_forward.py names it.

    These are reading, recalling and keeping [HV, R, K], scores [HV, R, C], met [HV, R, C] in fp32, inverse [HV, R, C],
    and in fp32 decay [G, HV, K] and beta [HV, R]; what is not fp32 is in v's dtype.
    """
    prepared = kda_prepare_fake(inputs, num_tokens)
    _launch(kda_forward.kda_prepare_kernel, GdnInputs(*inputs), num_tokens, _named(prepared))
    return prepared


@kda_prepare.register_fake
def kda_prepare_fake(inputs, num_tokens):
    x = GdnInputs(*inputs)
    key_dim, heads = x.dims.key_dim, x.dims.num_value_heads
    fp32 = {"dtype": torch.float32}
    return (
        *(x.empty_rows(key_dim) for _ in range(3)),
        x.empty_rows(CHUNK_SIZE),
        x.v_THV.new_empty(heads, x.row_R.shape[0], CHUNK_SIZE, **fp32),
        x.empty_rows(CHUNK_SIZE),
        x.v_THV.new_empty(x.chunk_start_G.shape[0], heads, key_dim, **fp32),
        x.v_THV.new_empty(heads, x.row_R.shape[0], **fp32),
    )


@torch.library.custom_op("megatron_sse::kda_summarize", mutates_args=())
def kda_summarize(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what each piece does to the state that enters it: transition [M, HV, K, K], increment [M, HV, K, V]."""
    transition_MHKK, increment_MHKV = kda_summarize_fake(inputs, num_tokens, prepared)
    results = {"transition_MHKK": transition_MHKK, "increment_MHKV": increment_MHKV}
    _launch(kda_forward.kda_summarize_kernel, GdnInputs(*inputs), num_tokens, _named(prepared) | results)
    return transition_MHKK, increment_MHKV


@kda_summarize.register_fake
def kda_summarize_fake(inputs, num_tokens, prepared):
    x = GdnInputs(*inputs)
    return tuple(x.empty_states(x.piece_start_M, columns) for columns in (x.dims.key_dim, x.dims.value_dim))


@torch.library.custom_op("megatron_sse::kda_attend", mutates_args=())
def kda_attend(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor) -> Tensor:
    """Return the outputs [R, HV, V] in v's dtype, given the states that enter the pieces."""
    o_RHV = kda_attend_fake(inputs, num_tokens, prepared, entering_MHKV)
    tensors = _named(prepared) | {"entering_MHKV": entering_MHKV, "o_RHV": o_RHV}
    _launch(kda_forward.kda_attend_kernel, GdnInputs(*inputs), num_tokens, tensors)
    return o_RHV


@kda_attend.register_fake
def kda_attend_fake(inputs, num_tokens, prepared, entering_MHKV):
    x = GdnInputs(*inputs)
    return x.v_THV.new_empty(x.row_R.shape[0], *x.v_THV.shape[1:])


@torch.library.custom_op("megatron_sse::kda_summarize_backward", mutates_args=())
def kda_summarize_backward(
    inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], grad_o_RHV: Tensor
) -> Tensor:
    """Return the fp32 gradients [M, HV, K, V] of the states that enter the pieces, through each piece's own outputs."""
    grad_entering_MHKV = kda_summarize_backward_fake(inputs, num_tokens, prepared, grad_o_RHV)
    tensors = _named(prepared) | {"grad_o_RHV": grad_o_RHV, "grad_entering_MHKV": grad_entering_MHKV}
    _launch(kda_backward.kda_states_backward_kernel, GdnInputs(*inputs), num_tokens, tensors)
    return grad_entering_MHKV


@kda_summarize_backward.register_fake
def kda_summarize_backward_fake(inputs, num_tokens, prepared, grad_o_RHV):
    x = GdnInputs(*inputs)
    return x.empty_states(x.piece_start_M, x.dims.value_dim)


@torch.library.custom_op("megatron_sse::kda_again", mutates_args=())
def kda_again(
    inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the backward pass needs of the forward pass, for kda_attend_backward, in v's dtype.

    These are the states that enter the chunks [G, HV, K, V] and what is written, by sorted position [HV, R, V].
    """
    states_GHKV, d_HRV = kda_again_fake(inputs, num_tokens, prepared, entering_MHKV)
    tensors = _named(prepared) | {"entering_MHKV": entering_MHKV, "states_GHKV": states_GHKV, "d_HRV": d_HRV}
    _launch(kda_forward.kda_attend_kernel, GdnInputs(*inputs), num_tokens, tensors, store=True)
    return states_GHKV, d_HRV


@kda_again.register_fake
def kda_again_fake(inputs, num_tokens, prepared, entering_MHKV):
    x = GdnInputs(*inputs)
    return x.empty_states(x.chunk_start_G, x.dims.value_dim, x.dims.dtype), x.empty_rows(x.dims.value_dim)


@torch.library.custom_op("megatron_sse::kda_attend_backward", mutates_args=())
def kda_attend_backward(
    inputs: Sequence[Tensor],
    num_tokens: int,
    prepared: Sequence[Tensor],
    again: Sequence[Tensor],
    grad_o_RHV: Tensor,
    grad_leaving_MHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by row: q, k [R, H, K], g [R, HV, K], beta [R, HV], v [R, HV, V], write and read [R].

    Args:
        again: what kda_again returns.
        grad_leaving_MHKV: the full gradients of the states that leave the pieces.
    """
    x = GdnInputs(*inputs)
    dims, rows = x.dims, x.row_R.shape[0]
    tensors = _named(prepared) | dict(zip(("states_GHKV", "d_HRV"), again, strict=True))
    tensors |= {"grad_states_GHKV": torch.empty_like(again[0]), "grad_change_HRV": torch.empty_like(again[1])}
    tensors |= {"grad_o_RHV": grad_o_RHV, "grad_leaving_MHKV": grad_leaving_MHKV}
    _launch(kda_backward.kda_states_backward_kernel, x, num_tokens, tensors, store=True)

    beta_HR = tensors["beta_HR"]
    tensors |= {"grad_scores_HRC": x.empty_rows(CHUNK_SIZE), "grad_met_HRC": x.empty_rows(CHUNK_SIZE)}
    tensors |= {f"grad_{name}_HRK": x.empty_rows(dims.key_dim) for name in ("reading", "recalling", "keeping")}
    tensors |= {"grad_gates_2HR": beta_HR.new_empty(2, *beta_HR.shape)}
    tensors |= {"through_GHK": torch.empty_like(tensors["decay_GHK"])}
    gradients = {"grad_q_RHK": x.q1_THK.new_empty(rows, dims.num_value_heads, dims.key_dim)}
    gradients["grad_k_RHK"] = x.k1_THK.new_empty(gradients["grad_q_RHK"].shape)
    gradients["grad_g_RHK"] = beta_HR.new_empty(gradients["grad_q_RHK"].shape)
    gradients["grad_v_RHV"] = x.v_THV.new_empty(rows, *x.v_THV.shape[1:])
    for name in ("beta", "write", "read"):
        gradients[f"grad_{name}_RH"] = beta_HR.new_empty(rows, dims.num_value_heads)
    _launch(kda_backward.kda_scores_backward_kernel, x, num_tokens, tensors | gradients)
    _launch(kda_backward.kda_inter_kernel, x, num_tokens, tensors | gradients)
    _launch(kda_backward.kda_intra_kernel, x, num_tokens, tensors | gradients)

    grad_q, grad_k, grad_g, grad_v, grad_beta, grad_write, grad_read = gradients.values()
    grad_q, grad_k = (sum_groups(grad, dims.num_heads) for grad in (grad_q, grad_k))
    return grad_q, grad_k, grad_g, grad_beta, grad_v, grad_write.sum(1), grad_read.sum(1)


@kda_attend_backward.register_fake
def kda_attend_backward_fake(inputs, num_tokens, prepared, again, grad_o_RHV, grad_leaving_MHKV):
    x = GdnInputs(*inputs)
    by_token = (x.q1_THK, x.k1_THK, x.g1_TH, x.beta1_TH, x.v_THV)
    rows = x.row_R.shape[0]
    return *(y.new_empty(rows, *y.shape[1:]) for y in by_token), *(y.new_empty(rows) for y in (x.write_R, x.read_R))


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
    of_products = "q1 k1 q2 k2 v reading recalling keeping inverse scores o states d grad_o grad_q grad_k grad_v"
    of_products += " grad_states grad_change grad_scores grad_met grad_reading grad_recalling grad_keeping"
    products = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys((f"{name}_ptr" for name in of_products.split()), products)
    types |= dict.fromkeys(
        ("chunk_start_ptr", "chunk_end_ptr", "piece_start_ptr", "piece_end_ptr", "chunk_ptr"), "*i64"
    )
    types |= dict.fromkeys(("row_ptr", "token_ptr", "run_ptr"), "*i32")
    types |= {"num_tokens": "i32", "num_rows": "i32"} | dict.fromkeys(constants, "constexpr")
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}
