"""The gated delta rule over rows read through tables: the operators around the scan over pieces (see delta_rule.py)."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.triton import gdn_backward, gdn_forward
from megatron_sse.kernels.triton.delta_rule import (
    DeltaRuleInputs,
    Dims,
    Kernels,
    empty_gradients,
    register,
    states_backward,
    sum_groups,
)
from megatron_sse.kernels.triton.target import Target, target_of


def _plan(kernel: triton.JITFunction, dims: Dims, target: Target) -> tuple[dict, dict]:
    """Return a kernel's constants and launch options.

    In fp32, products run without tensor cores and hold full operands in registers: hence small blocks and many warps.
    Where shared memory is small, tensor cores read from registers too, and two stages of 256 keys do not fit.
    """
    half, large = dims.dtype != torch.float32, target.is_large
    key_block, value_block = (max(16, triton.next_power_of_2(x)) for x in (dims.key_dim, dims.value_dim))
    key_part, value_part = (64, 64 if large or kernel in KERNELS.per_chunk else 32) if half else (16, 16)
    constants = {
        "H": dims.num_heads,
        "HV": dims.num_value_heads,
        "BH": triton.next_power_of_2(dims.num_value_heads),
        "K": dims.key_dim,
        "V": dims.value_dim,
        "BK": key_block if kernel in KERNELS.per_piece else min(key_block, key_part),
        "BV": min(value_block, value_part),
        "KEY_BLOCKS": triton.cdiv(dims.key_dim, min(key_block, key_part)),
        "SCALE": dims.key_dim**-0.5,
        "STORE": False,
        "C": CHUNK_SIZE,
    }
    options = {"num_warps": 4 if half else 8, "num_stages": 2 if half else 1}
    if kernel in KERNELS.per_piece and key_block == 256:
        options = {"num_warps": 2 * options["num_warps"], "num_stages": options["num_stages"] if large else 1}
    return {name: x for name, x in constants.items() if name in kernel.arg_names}, options


KERNELS = Kernels(
    summarize=gdn_forward.gdn_summarize_kernel,
    attend=gdn_forward.gdn_attend_kernel,
    states_backward=gdn_backward.gdn_states_backward_kernel,
    per_chunk=(
        gdn_forward.gdn_gates_kernel,
        gdn_forward.gdn_prepare_kernel,
        gdn_backward.gdn_scores_backward_kernel,
        gdn_backward.gdn_keys_backward_kernel,
        gdn_backward.gdn_gates_backward_kernel,
    ),
    in_key_blocks=gdn_backward.gdn_keys_backward_kernel,
    over_heads=gdn_forward.gdn_gates_kernel,
    prepared=("inverse_HRC", "scores_HRC", "gates_4HR"),
    products=(),
    plan=_plan,
)
compile_cases = KERNELS.compile_cases
gdn_summarize, gdn_attend, gdn_summarize_backward, gdn_again = register("gdn", KERNELS)


@torch.library.custom_op("megatron_sse::gdn_prepare", mutates_args=())
def gdn_prepare(inputs: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what needs no state: the chunks' inverses and scores [HV, R, C] in v's dtype, fp32 gates [4, HV, R]."""
    x = DeltaRuleInputs(*inputs)
    inverse_HRC, scores_HRC, gates_4HR = gdn_prepare_fake(inputs, num_tokens)
    prepared = {"inverse_HRC": inverse_HRC, "scores_HRC": scores_HRC, "gates_4HR": gates_4HR}
    KERNELS.launch(gdn_forward.gdn_gates_kernel, x, num_tokens, prepared)
    KERNELS.launch(gdn_forward.gdn_prepare_kernel, x, num_tokens, prepared)
    return inverse_HRC, scores_HRC, gates_4HR


@gdn_prepare.register_fake
def gdn_prepare_fake(inputs, num_tokens):
    x = DeltaRuleInputs(*inputs)
    gates_4HR = x.v_THV.new_empty(4, x.dims.num_value_heads, x.row_R.shape[0], dtype=torch.float32)
    return x.empty_rows(CHUNK_SIZE), x.empty_rows(CHUNK_SIZE), gates_4HR


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
    x = DeltaRuleInputs(*inputs)
    dims = x.dims
    tensors = states_backward(KERNELS, x, num_tokens, prepared, again, grad_o_RHV, grad_leaving_MHKV)

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
    KERNELS.launch(gdn_backward.gdn_scores_backward_kernel, x, num_tokens, tensors | gradients)
    KERNELS.launch(gdn_backward.gdn_keys_backward_kernel, x, num_tokens, tensors | gradients)
    KERNELS.launch(gdn_backward.gdn_gates_backward_kernel, x, num_tokens, tensors | gradients)

    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_write, grad_read = gradients.values()
    grad_q, grad_k = (sum_groups(grad, dims.num_heads) for grad in (grad_q, grad_k))
    return grad_q, grad_k, grad_g, grad_beta, grad_v, grad_write.sum(1), grad_read.sum(1)


gdn_attend_backward.register_fake(empty_gradients)
