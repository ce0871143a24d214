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
            # A copy: the gradient may be a view, or belong to somebody else.
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
    """x itself, the same on every rank of the group, for use by each rank's own part: its gradient is summed.

    Megatron-Core's copy_to_tensor_model_parallel_region does not sum a gradient that is not contiguous.
    """
    return _SumGradient.apply(x, group)


def sum_value(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the ranks of the group, for use alike on all of them: its gradient goes back as it is."""
    return _SumValue.apply(x, group)
