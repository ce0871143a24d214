"""Queries and keys of the delta rule divided by their norms (banks.l2_normalize), both kinds of banks at once."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4}
MOST = 4  # tensors of a launch


@triton.jit
def _load(ptr, row, num_rows, column, K: tl.constexpr):
    mask = (row < num_rows)[:, None] & (column < K)
    return tl.load(ptr + row[:, None] * K + column, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _choose(ptr1, ptr2, ptr3, ptr4):
    """Return the pointer of the program's tensor."""
    number = tl.program_id(1)
    if number == 1:
        ptr1 = ptr2
    if number == 2:
        ptr1 = ptr3
    if number == 3:
        ptr1 = ptr4
    return ptr1


@triton.jit(do_not_specialize=["num_rows"])
def normalize_kernel(
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    y4_ptr,
    num_rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y = x / sqrt(sum x^2 + 1e-6); program (block of rows, which of the tensors)."""
    x_ptr, y_ptr = _choose(x1_ptr, x2_ptr, x3_ptr, x4_ptr), _choose(y1_ptr, y2_ptr, y3_ptr, y4_ptr)
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    b_x, mask = _load(x_ptr, row, num_rows, column, K)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]
    tl.store(y_ptr + row[:, None] * K + column, b_y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def normalize_backward_kernel(
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    grad1_ptr,
    grad2_ptr,
    grad3_ptr,
    grad4_ptr,
    grad_x1_ptr,
    grad_x2_ptr,
    grad_x3_ptr,
    grad_x4_ptr,
    num_rows,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradient of x, (g - y (y . g)) / sqrt(sum x^2 + 1e-6); programs as above."""
    x_ptr = _choose(x1_ptr, x2_ptr, x3_ptr, x4_ptr)
    grad_ptr = _choose(grad1_ptr, grad2_ptr, grad3_ptr, grad4_ptr)
    grad_x_ptr = _choose(grad_x1_ptr, grad_x2_ptr, grad_x3_ptr, grad_x4_ptr)
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    b_x, mask = _load(x_ptr, row, num_rows, column, K)
    b_grad, _ = _load(grad_ptr, row, num_rows, column, K)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]
    b_y = b_x * b_scale
    b_grad_x = b_scale * (b_grad - b_y * tl.sum(b_y * b_grad, axis=1)[:, None])
    tl.store(grad_x_ptr + row[:, None] * K + column, b_grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _constants(key_dim: int) -> dict:
    block_k = triton.next_power_of_2(key_dim)
    return {"K": key_dim, "BLOCK_R": max(1, 4096 // block_k), "BLOCK_K": block_k}


def _launch(kernel: triton.JITFunction, *sets: Sequence[Tensor]) -> None:
    """Launch a kernel on sets of up to four tensors each, all of one shape."""
    number, first = len(sets[0]), sets[0][0]
    num_rows, constants = first.numel() // first.shape[-1], _constants(first.shape[-1])
    # Triton needs a pointer for every argument; those behind the last tensor are never read.
    pointers = [x for tensors in sets for x in (*tensors, *[tensors[0]] * (MOST - number))]
    kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]), number)](*pointers, num_rows, **constants, **OPTIONS)


@torch.library.custom_op("megatron_sse::normalize", mutates_args=())
def _normalize(x: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    y = _normalize_fake(x, dtype)
    _launch(normalize_kernel, x, y)
    return y


@_normalize.register_fake
def _normalize_fake(x, dtype):
    return [torch.empty_like(each, dtype=dtype) for each in x]


@torch.library.custom_op("megatron_sse::normalize_backward", mutates_args=())
def _normalize_backward(x: list[Tensor], grad: list[Tensor]) -> list[Tensor]:
    grad_x = _normalize_backward_fake(x, grad)
    _launch(normalize_backward_kernel, x, [each.contiguous() for each in grad], grad_x)
    return grad_x


@_normalize_backward.register_fake
def _normalize_backward_fake(x, grad):
    return [torch.empty_like(each) for each in x]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *x):
        ctx.save_for_backward(*x)
        return tuple(_normalize(list(x), dtype))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_normalize_backward(list(ctx.saved_tensors), list(grads))


def normalize(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return l2_normalize of up to four tensors of queries or keys [T, H, K], computed in fp32, in `dtype`."""
    assert len(tensors) <= MOST and len({x.shape for x in tensors}) == 1
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    normalized: tuple[Tensor, ...] = _Normalize.apply(dtype, *(x.to(common).contiguous() for x in tensors))
    return normalized


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
