"""The short causal depthwise convolution, with one kernel forward and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Limit on the programs of the backward pass, each of which writes a partial sum of the weight's gradient.
MAX_PROGRAMS = 4096
BLOCKS = {"BLOCK_T": 32, "BLOCK_DIM": 64}
OPTIONS = {"num_warps": 4}


@triton.jit
def conv_forward_kernel(
    x_ptr,
    weight_ptr,
    position_ptr,
    y_ptr,
    num_tokens,
    DIM: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Compute the outputs; program (block of tokens, block of channels).

    A token at position 1 of its document sees itself and one token before: `back` runs only as far as the position.
    """
    num_blocks: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    token = (tl.program_id(0) // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(0) % num_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = (token < num_tokens)[:, None] & (channel < DIM)
    b_position = tl.load(position_ptr + token, mask=token < num_tokens, other=0)
    b_y = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32)
    for back in tl.static_range(W):
        # The last tap is the token's own.
        b_weight = tl.load(weight_ptr + channel * W + (W - 1 - back), mask=channel < DIM, other=0.0).to(tl.float32)
        earlier = token - back
        seen = inside & ((b_position >= back) & (earlier >= 0))[:, None]
        b_y += tl.load(x_ptr + earlier[:, None] * DIM + channel, mask=seen, other=0.0).to(tl.float32) * b_weight
    tl.store(y_ptr + token[:, None] * DIM + channel, b_y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def conv_backward_kernel(
    x_ptr,
    weight_ptr,
    position_ptr,
    grad_y_ptr,
    grad_x_ptr,
    partial_ptr,
    num_tokens,
    num_steps,
    DIM: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Compute the gradient of x, and a partial sum of the weight's gradient.

    Program (num_steps blocks of tokens, block of channels).
    """
    num_blocks: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    program = (tl.program_id(0) // num_blocks).to(tl.int64)
    channel = tl.program_id(0) % num_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    tap = tl.arange(0, BLOCK_W)
    b_partial = tl.zeros([BLOCK_W, BLOCK_DIM], tl.float32)
    for step in range(num_steps):
        token = (program * num_steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < num_tokens)[:, None] & (channel < DIM)
        b_x = tl.load(x_ptr + token[:, None] * DIM + channel, mask=inside, other=0.0).to(tl.float32)
        b_grad_x = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32)
        # The later tokens that saw this one: those at most W - 1 further in the same document.
        for ahead in tl.static_range(W):
            b_weight = tl.load(weight_ptr + channel * W + (W - 1 - ahead), mask=channel < DIM, other=0.0).to(tl.float32)
            later = token + ahead
            b_position = tl.load(position_ptr + later, mask=later < num_tokens, other=-1)
            sees = (b_position >= ahead)[:, None] & (channel < DIM)
            b_grad = tl.load(grad_y_ptr + later[:, None] * DIM + channel, mask=sees, other=0.0).to(tl.float32)
            b_grad_x += b_grad * b_weight
            b_partial += tl.where(tap[:, None] == W - 1 - ahead, tl.sum(b_grad * b_x, axis=0)[None, :], 0.0)
        tl.store(grad_x_ptr + token[:, None] * DIM + channel, b_grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    # Partial sums [programs, channels, taps], read back as the weight's own layout.
    place = (program * DIM + channel[None, :]) * W + tap[:, None]
    tl.store(partial_ptr + place, b_partial, mask=(tap < W)[:, None] & (channel < DIM))


def _constants(num_channels: int, width: int) -> dict:
    return {"DIM": num_channels, "W": width} | BLOCKS


@torch.library.custom_op("megatron_sse::conv_forward", mutates_args=())
def _forward(x_Tc: Tensor, weight_cW: Tensor, position_T: Tensor) -> Tensor:
    num_tokens, num_channels = x_Tc.shape
    y_Tc = torch.empty_like(x_Tc, dtype=torch.promote_types(x_Tc.dtype, weight_cW.dtype))
    constants = _constants(*weight_cW.shape)
    grid = (triton.cdiv(num_tokens, BLOCKS["BLOCK_T"]) * triton.cdiv(num_channels, BLOCKS["BLOCK_DIM"]),)
    conv_forward_kernel[grid](x_Tc, weight_cW, position_T, y_Tc, num_tokens, **constants, **OPTIONS)
    return y_Tc


@_forward.register_fake
def _(x_Tc, weight_cW, position_T):
    return torch.empty_like(x_Tc, dtype=torch.promote_types(x_Tc.dtype, weight_cW.dtype))


@torch.library.custom_op("megatron_sse::conv_backward", mutates_args=())
def _backward(x_Tc: Tensor, weight_cW: Tensor, position_T: Tensor, grad_y_Tc: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    num_tokens, num_channels = x_Tc.shape
    token_blocks = triton.cdiv(num_tokens, BLOCKS["BLOCK_T"])
    channel_blocks = triton.cdiv(num_channels, BLOCKS["BLOCK_DIM"])
    num_steps = triton.cdiv(token_blocks * channel_blocks, MAX_PROGRAMS)
    num_parts = triton.cdiv(token_blocks, num_steps)
    grad_x_Tc = torch.empty_like(x_Tc)
    # Partial sums are added up afterwards in a fixed order: atomic additions would not be deterministic.
    partial_ZcW = torch.empty(num_parts, *weight_cW.shape, dtype=torch.float32, device=x_Tc.device)
    conv_backward_kernel[(num_parts * channel_blocks,)](
        x_Tc,
        weight_cW,
        position_T,
        grad_y_Tc,
        grad_x_Tc,
        partial_ZcW,
        num_tokens,
        num_steps,
        **_constants(*weight_cW.shape),
        BLOCK_W=triton.next_power_of_2(weight_cW.shape[1]),
        **OPTIONS,
    )
    return grad_x_Tc, partial_ZcW.sum(0).to(weight_cW.dtype)


@_backward.register_fake
def _(x_Tc, weight_cW, position_T, grad_y_Tc):
    return torch.empty_like(x_Tc), torch.empty_like(weight_cW)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_Tc, weight_cW, position_T):
        ctx.save_for_backward(x_Tc, weight_cW, position_T)
        return _forward(x_Tc, weight_cW, position_T)

    @staticmethod
    def backward(ctx, grad_y_Tc):
        grad_x_Tc, grad_weight_cW = _backward(*ctx.saved_tensors, grad_y_Tc.contiguous())
        return grad_x_Tc, grad_weight_cW, None


def short_convolution(x_Tc: Tensor, weight_cW: Tensor, position_T: Tensor) -> Tensor:
    """Compute kernels.conv.short_convolution with sums in fp32, rounded once."""
    return _ShortConvolution.apply(x_Tc.contiguous(), weight_cW.contiguous(), position_T.contiguous())


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    cases = []
    for dtype in ("*bf16", "*fp32"):
        inputs = {"x_ptr": dtype, "weight_ptr": dtype, "position_ptr": "*i64"}
        forward = inputs | {"y_ptr": dtype, "num_tokens": "i32"}
        backward = inputs | {"grad_y_ptr": dtype, "grad_x_ptr": dtype, "partial_ptr": "*fp32"}
        backward |= {"num_tokens": "i32", "num_steps": "i32"}
        # Programs take blocks of channels, so the head dim makes no difference.
        for width in (2, 4, 8):
            constants = _constants(4096, width)
            cases.append((conv_forward_kernel, forward, constants, OPTIONS))
            cases.append((conv_backward_kernel, backward, constants | {"BLOCK_W": width}, OPTIONS))
    return cases
