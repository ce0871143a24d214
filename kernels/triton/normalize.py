"""Queries or keys of the delta rule divided by their norms (banks.l2_normalize), both kinds of banks at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4}


@triton.jit
def _load(ptr, row, num_rows, column, K: tl.constexpr):
    mask = (row < num_rows)[:, None] & (column < K)
    return tl.load(ptr + row[:, None] * K + column, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit(do_not_specialize=["num_rows"])
def normalize_kernel(
    x1_ptr, x2_ptr, y1_ptr, y2_ptr, num_rows, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Compute y = x / sqrt(sum x^2 + 1e-6); program (block of rows, which of the tensors)."""
    if tl.program_id(1) == 1:
        x1_ptr, y1_ptr = x2_ptr, y2_ptr
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    b_x, mask = _load(x1_ptr, row, num_rows, column, K)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]
    tl.store(y1_ptr + row[:, None] * K + column, b_y.to(y1_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def normalize_backward_kernel(
    x1_ptr,
    x2_ptr,
    grad1_ptr,
    grad2_ptr,
    grad_x1_ptr,
    grad_x2_ptr,
    num_rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradient of x, (g - y (y . g)) / sqrt(sum x^2 + 1e-6); programs as above."""
    if tl.program_id(1) == 1:
        x1_ptr, grad1_ptr, grad_x1_ptr = x2_ptr, grad2_ptr, grad_x2_ptr
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    b_x, mask = _load(x1_ptr, row, num_rows, column, K)
    b_grad, _ = _load(grad1_ptr, row, num_rows, column, K)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]
    b_y = b_x * b_scale
    b_grad_x = b_scale * (b_grad - b_y * tl.sum(b_y * b_grad, axis=1)[:, None])
    tl.store(grad_x1_ptr + row[:, None] * K + column, b_grad_x.to(grad_x1_ptr.dtype.element_ty), mask=mask)


def _constants(key_dim: int) -> dict:
    block_k = triton.next_power_of_2(key_dim)
    return {"K": key_dim, "BLOCK_R": max(1, 4096 // block_k), "BLOCK_K": block_k}


def _grid(x: Tensor, constants: dict, both: bool) -> tuple[int, int]:
    return triton.cdiv(x.numel() // x.shape[-1], constants["BLOCK_R"]), 1 + both


@torch.library.custom_op("megatron_sse::normalize", mutates_args=())
def _normalize(x1_THK: Tensor, x2_THK: Tensor, both: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y1_THK, y2_THK = _normalize_fake(x1_THK, x2_THK, both, dtype)
    constants = _constants(x1_THK.shape[-1])
    normalize_kernel[_grid(x1_THK, constants, both)](
        x1_THK, x2_THK, y1_THK, y2_THK, x1_THK.numel() // x1_THK.shape[-1], **constants, **OPTIONS
    )
    return y1_THK, y2_THK


@_normalize.register_fake
def _normalize_fake(x1_THK, x2_THK, both, dtype):
    second = torch.empty_like(x2_THK, dtype=dtype) if both else x1_THK.new_empty(0, dtype=dtype)
    return torch.empty_like(x1_THK, dtype=dtype), second


@torch.library.custom_op("megatron_sse::normalize_backward", mutates_args=())
def _normalize_backward(
    x1_THK: Tensor, x2_THK: Tensor, grad1_THK: Tensor, grad2_THK: Tensor, both: bool
) -> tuple[Tensor, Tensor]:
    grads = _normalize_backward_fake(x1_THK, x2_THK, grad1_THK, grad2_THK, both)
    constants = _constants(x1_THK.shape[-1])
    given = x1_THK, x2_THK, grad1_THK.contiguous(), grad2_THK.contiguous()
    normalize_backward_kernel[_grid(x1_THK, constants, both)](
        *given, *grads, x1_THK.numel() // x1_THK.shape[-1], **constants, **OPTIONS
    )
    return grads


@_normalize_backward.register_fake
def _normalize_backward_fake(x1_THK, x2_THK, grad1_THK, grad2_THK, both):
    return torch.empty_like(x1_THK), torch.empty_like(x2_THK) if both else x2_THK.new_empty(0)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x1_THK, x2_THK, both, dtype):
        ctx.save_for_backward(x1_THK, x2_THK)
        ctx.both = both
        return _normalize(x1_THK, x2_THK, both, dtype)

    @staticmethod
    def backward(ctx, grad1_THK, grad2_THK):
        grad1, grad2 = _normalize_backward(*ctx.saved_tensors, grad1_THK, grad2_THK, ctx.both)
        return grad1, grad2 if ctx.both else None, None, None


def normalize_one(x_THK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return l2_normalize of queries or keys, computed in fp32, in `dtype`."""
    x_THK = x_THK.contiguous()
    y_THK: Tensor = _Normalize.apply(x_THK, x_THK, False, dtype)[0]
    return y_THK


def normalize_both(x1_THK: Tensor, x2_THK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what normalize_one does of two tensors of one shape."""
    common = torch.promote_types(x1_THK.dtype, x2_THK.dtype)
    x1_THK, x2_THK = (x.to(common).contiguous() for x in (x1_THK, x2_THK))
    y1_THK, y2_THK = _Normalize.apply(x1_THK, x2_THK, True, dtype)
    return y1_THK, y2_THK


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    cases = []
    for dtype in ("*bf16", "*fp32"):
        for dim in (64, 128, 256):
            for kernel in (normalize_kernel, normalize_backward_kernel):
                constants = _constants(dim)
                names = [name for name in kernel.arg_names if name not in constants]
                signature = {name: dtype if name.endswith("_ptr") else "i32" for name in names}
                cases.append((kernel, signature, constants, OPTIONS))
    return cases
