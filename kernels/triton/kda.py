"""The delta rule with a decay per key channel, over rows read through tables: the operators around the scan.

They are called like those of gdn.py (see delta_rule.py), with log decays [T, HV, K].
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.triton import kda_backward, kda_forward
from megatron_sse.kernels.triton.delta_rule import (
    DeltaRuleInputs,
    Dims,
    Kernels,
    empty_gradients,
    register,
    states_backward,
    sum_groups,
)
from megatron_sse.kernels.triton.gla import MILD
from megatron_sse.kernels.triton.target import Target

# Kernels whose programs hold many tiles [C, K] at once, in 16 columns so that they do not spill.
_NARROW = (kda_forward.kda_prepare_kernel, kda_backward.kda_intra_kernel)


def _plan(kernel: triton.JITFunction, dims: Dims, target: Target) -> tuple[dict, dict]:
    """Return a kernel's constants and launch options; blocks are small where shared memory is, and in fp32."""
    half, large = dims.dtype != torch.float32, target.is_large
    key_block, value_block = (max(16, triton.next_power_of_2(x)) for x in (dims.key_dim, dims.value_dim))
    fits = kernel in KERNELS.per_chunk or (large and key_block < 256)
    key_part, value_part = (64, 64 if fits else 32) if half else (16, 16)
    if kernel in _NARROW:
        key_part = 16
    constants = {
        "H": dims.num_heads,
        "HV": dims.num_value_heads,
        "K": dims.key_dim,
        "V": dims.value_dim,
        "BK": key_block if kernel in KERNELS.per_piece else min(key_block, key_part),
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


KERNELS = Kernels(
    summarize=kda_forward.kda_summarize_kernel,
    attend=kda_forward.kda_attend_kernel,
    states_backward=kda_backward.kda_states_backward_kernel,
    per_chunk=(
        kda_forward.kda_prepare_kernel,
        kda_backward.kda_scores_backward_kernel,
        kda_backward.kda_inter_kernel,
        kda_backward.kda_intra_kernel,
    ),
    in_key_blocks=kda_backward.kda_intra_kernel,
    over_heads=None,
    prepared=(
        *("reading_HRK", "recalling_HRK", "keeping_HRK", "scores_HRC"),
        *("met_HRC", "inverse_HRC", "decay_GHK", "beta_HR"),
    ),
    products=("reading", "recalling", "keeping", "grad_reading", "grad_recalling", "grad_keeping"),
    plan=_plan,
)
compile_cases = KERNELS.compile_cases
kda_summarize, kda_attend, kda_summarize_backward, kda_again = register("kda", KERNELS)


@torch.library.custom_op("megatron_sse::kda_prepare", mutates_args=())
def kda_prepare(
    inputs: Sequence[Tensor], num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what needs no state, as kda_forward.py names it.

    These are reading, recalling and keeping [HV, R, K], scores [HV, R, C], met [HV, R, C] in fp32, inverse [HV, R, C],
    and in fp32 decay [G, HV, K] and beta [HV, R]; what is not fp32 is in v's dtype.
    """
    prepared = kda_prepare_fake(inputs, num_tokens)
    KERNELS.launch(kda_forward.kda_prepare_kernel, DeltaRuleInputs(*inputs), num_tokens, KERNELS.named(prepared))
    return prepared


@kda_prepare.register_fake
def kda_prepare_fake(inputs, num_tokens):
    x = DeltaRuleInputs(*inputs)
    key_dim, heads = x.dims.key_dim, x.dims.num_value_heads
    return (
        *(x.empty_rows(key_dim) for _ in range(3)),
        x.empty_rows(CHUNK_SIZE),
        x.empty_rows(CHUNK_SIZE, dtype=torch.float32),
        x.empty_rows(CHUNK_SIZE),
        x.v_THV.new_empty(x.chunk_start_G.shape[0], heads, key_dim, dtype=torch.float32),
        x.empty_rows(dtype=torch.float32),
    )


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
    x = DeltaRuleInputs(*inputs)
    dims, rows = x.dims, x.row_R.shape[0]
    tensors = states_backward(KERNELS, x, num_tokens, prepared, again, grad_o_RHV, grad_leaving_MHKV)

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
    KERNELS.launch(kda_backward.kda_scores_backward_kernel, x, num_tokens, tensors | gradients)
    KERNELS.launch(kda_backward.kda_inter_kernel, x, num_tokens, tensors | gradients)
    KERNELS.launch(kda_backward.kda_intra_kernel, x, num_tokens, tensors | gradients)

    grad_q, grad_k, grad_g, grad_v, grad_beta, grad_write, grad_read = gradients.values()
    grad_q, grad_k = (sum_groups(grad, dims.num_heads) for grad in (grad_q, grad_k))
    return grad_q, grad_k, grad_g, grad_beta, grad_v, grad_write.sum(1), grad_read.sum(1)


kda_attend_backward.register_fake(empty_gradients)
