"""Sums over a group as parts of a differentiable computation."""

import torch
import torch.distributed as dist
from torch import Tensor


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.group.size() > 1:
            # all_reduce works in place, and autograd may still use this gradient elsewhere, or it may be a view.
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        if group.size() > 1:
            x = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x unchanged; backward sums its gradient over the ranks of the group.

    For an x that is the same on every rank and enters each rank's own part of a computation (such as the columns of a
    split matrix). Megatron-Core's copy_to_tensor_model_parallel_region does not sum a gradient that is not contiguous.
    """
    return _SumGradient.apply(x, group) if torch.is_grad_enabled() else x


def sum_value(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks of the group; backward passes the gradient on unchanged.

    For a sum that every rank uses in the same way, so that its gradient is already the same on all of them.
    """
    return _SumValue.apply(x, group)
