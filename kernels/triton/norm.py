"""The epilogue after the banks, in one pass: the sum of their outputs, RMSNorm per head, the output gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PARTIALS = 1024


@triton.jit
def _load_sum(o_ptr, picked_ptr, row, column, inside, num_heads, V: tl.constexpr, P: tl.constexpr):
    """Load rows (token, head) of the shared bank's output and add those of the picks; return offsets and sums."""
    cell = row[:, None] * V + column
    b_x = tl.load(o_ptr + cell, mask=inside, other=0.0).to(tl.float32)
    token, head = row // num_heads, row % num_heads
    # Picks are [T, P, H, V]: row (token, head) has its picks H rows apart.
    for pick in range(P):
        picked_row = (token * P + pick) * num_heads + head
        b_x += tl.load(picked_ptr + picked_row[:, None] * V + column, mask=inside, other=0.0).to(tl.float32)
    return cell, b_x


@triton.jit
def norm_forward_kernel(
    o_ptr,
    picked_ptr,
    weight_ptr,
    gate_ptr,
    out_ptr,
    num_rows,
    num_heads,
    eps,
    V: tl.constexpr,
    P: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute silu(gate) * RMSNorm(sum of outputs); program (block of rows), a row is a token's head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_V)
    inside = (row < num_rows)[:, None] & (column < V)
    cell, b_x = _load_sum(o_ptr, picked_ptr, row, column, inside, num_heads, V, P)
    b_weight = tl.load(weight_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) / V + eps)[:, None] * b_weight
    if HAS_GATE:
        b_gate = tl.load(gate_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        b_out *= b_gate * tl.sigmoid(b_gate)
    tl.store(out_ptr + cell, b_out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    o_ptr,
    picked_ptr,
    weight_ptr,
    gate_ptr,
    grad_out_ptr,
    grad_o_ptr,
    grad_gate_ptr,
    partial_ptr,
    num_rows,
    num_heads,
    num_steps,
    eps,
    V: tl.constexpr,
    P: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the gradients of outputs and gate, and a partial sum of the weight's; program (num_steps blocks of rows).

    With n = x / rms(x) and g the gradient of n: the gradient of x is (g - n mean(g n)) / rms(x).
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    b_weight = tl.load(weight_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    b_partial = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for step in range(num_steps):
        row = (program * num_steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < num_rows)[:, None] & (column < V)
        cell, b_x = _load_sum(o_ptr, picked_ptr, row, column, inside, num_heads, V, P)
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / V + eps)[:, None]
        b_normed = b_x * b_scale
        b_grad = tl.load(grad_out_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            b_gate = tl.load(gate_ptr + cell, mask=inside, other=0.0).to(tl.float32)
            b_sigmoid = tl.sigmoid(b_gate)
            # The derivative of silu: (x sigmoid(x))' = sigmoid(x) (1 + x (1 - sigmoid(x))).
            b_slope = b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
            b_grad_gate = b_grad * b_normed * b_weight * b_slope
            tl.store(grad_gate_ptr + cell, b_grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
            b_grad *= b_gate * b_sigmoid
        b_partial += b_grad * b_normed
        b_grad *= b_weight
        # The part of the gradient along n itself changes only the length, which the norm takes out again.
        b_along = tl.sum(b_grad * b_normed, axis=1)[:, None] / V
        b_grad_o = b_scale * (b_grad - b_normed * b_along)
        tl.store(grad_o_ptr + cell, b_grad_o.to(grad_o_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * V + column, tl.sum(b_partial, axis=0), mask=column < V)


def _constants(value_dim: int, num_picks: int, has_gate: bool) -> dict:
    block_v = triton.next_power_of_2(value_dim)
    return {"V": value_dim, "P": num_picks, "HAS_GATE": has_gate, "BLOCK_R": 2048 // block_v, "BLOCK_V": block_v}


OPTIONS = {"num_warps": 4}


@torch.library.custom_op("megatron_sse::norm_forward", mutates_args=())
def _forward(o_THV: Tensor, picked: Tensor | None, weight_V: Tensor, gate_THV: Tensor | None, eps: float) -> Tensor:
    _, num_heads, value_dim = o_THV.shape
    num_rows = o_THV.numel() // value_dim
    out_THV = torch.empty_like(o_THV if gate_THV is None else gate_THV)
    constants = _constants(value_dim, 0 if picked is None else picked.shape[1], gate_THV is not None)
    norm_forward_kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]),)](
        o_THV,
        o_THV if picked is None else picked,
        weight_V,
        o_THV if gate_THV is None else gate_THV,
        out_THV,
        num_rows,
        num_heads,
        eps,
        **constants,
        **OPTIONS,
    )
    return out_THV


@_forward.register_fake
def _(o_THV, picked, weight_V, gate_THV, eps):
    return torch.empty_like(o_THV if gate_THV is None else gate_THV)


@torch.library.custom_op("megatron_sse::norm_backward", mutates_args=())
def _backward(
    o_THV: Tensor,
    picked: Tensor | None,
    weight_V: Tensor,
    gate_THV: Tensor | None,
    grad_out_THV: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of o, weight and gate (an empty tensor where there is no gate)."""
    _, num_heads, value_dim = o_THV.shape
    num_rows = o_THV.numel() // value_dim
    constants = _constants(value_dim, 0 if picked is None else picked.shape[1], gate_THV is not None)
    num_blocks = triton.cdiv(num_rows, constants["BLOCK_R"])
    # At most MAX_PARTIALS programs, each of which walks over num_steps blocks of rows.
    num_steps = triton.cdiv(num_blocks, MAX_PARTIALS)
    num_programs = triton.cdiv(num_blocks, num_steps)
    grad_o_THV = torch.empty_like(o_THV)
    grad_gate = o_THV.new_empty(0) if gate_THV is None else torch.empty_like(gate_THV)
    partial_ZV = torch.empty(num_programs, value_dim, dtype=torch.float32, device=o_THV.device)
    norm_backward_kernel[(num_programs,)](
        o_THV,
        o_THV if picked is None else picked,
        weight_V,
        o_THV if gate_THV is None else gate_THV,
        grad_out_THV,
        grad_o_THV,
        grad_gate,
        partial_ZV,
        num_rows,
        num_heads,
        num_steps,
        eps,
        **constants,
        **OPTIONS,
    )
    return grad_o_THV, partial_ZV.sum(0).to(weight_V.dtype), grad_gate


@_backward.register_fake
def _(o_THV, picked, weight_V, gate_THV, grad_out_THV, eps):
    grad_gate = o_THV.new_empty(0) if gate_THV is None else torch.empty_like(gate_THV)
    return torch.empty_like(o_THV), torch.empty_like(weight_V), grad_gate


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o_THV, picked_TPHV, weight_V, gate_THV, eps):
        ctx.save_for_backward(o_THV, picked_TPHV, weight_V, gate_THV)
        ctx.eps = eps
        return _forward(o_THV, picked_TPHV, weight_V, gate_THV, eps)

    @staticmethod
    def backward(ctx, grad_out_THV):
        o_THV, picked_TPHV, weight_V, gate_THV = ctx.saved_tensors
        grad_o, grad_weight, grad_gate = _backward(*ctx.saved_tensors, grad_out_THV.contiguous(), ctx.eps)
        # All summands have the same gradient, so the picks share one tensor.
        grad_picked = None
        if picked_TPHV is not None:
            grad_picked = grad_o.to(picked_TPHV.dtype)[:, None].expand_as(picked_TPHV)
        return grad_o, grad_picked, grad_weight, None if gate_THV is None else grad_gate, None


def gated_norm(
    o_THV: Tensor, picked_TPHV: Tensor | None, weight_V: Tensor, gate_THV: Tensor | None, eps: float
) -> Tensor:
    """Compute kernels.norm.gated_norm with fp32 arithmetic."""
    picked_TPHV, gate_THV = (None if x is None else x.contiguous() for x in (picked_TPHV, gate_THV))
    return _GatedNorm.apply(o_THV.contiguous(), picked_TPHV, weight_V.contiguous(), gate_THV, eps)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    cases = []
    for dtype in ("*bf16", "*fp32"):
        inputs = {f"{name}_ptr": dtype for name in ("o", "picked", "weight", "gate")}
        sizes = {"num_rows": "i32", "num_heads": "i32"}
        forward = inputs | {"out_ptr": dtype} | sizes | {"eps": "fp32"}
        grads = {f"grad_{name}_ptr": dtype for name in ("out", "o", "gate")}
        backward = inputs | grads | {"partial_ptr": "*fp32"} | sizes | {"num_steps": "i32", "eps": "fp32"}
        for dim in (64, 128, 256):
            constants = _constants(dim, 2, True)
            cases.append((norm_forward_kernel, forward, constants, OPTIONS))
            cases.append((norm_backward_kernel, backward, constants, OPTIONS))
    return cases
