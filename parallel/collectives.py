"""Sums and gathers over a group as parts of a differentiable computation, and of updated weights."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
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


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *parts):
        ctx.group = group
        # As bytes, so that tensors of different dtypes travel together.
        own = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
        gathered = own.new_empty(group.size(), len(own))
        dist.all_gather_into_tensor(gathered.flatten(), own, group=group)
        by_part = gathered.split([part.nbytes for part in parts], dim=1)
        # Copied to the start of a tensor of their own: the other parts' bytes would break the alignment.
        return tuple(
            x.contiguous().view(part.dtype).view(-1, *part.shape[1:]) for x, part in zip(by_part, parts, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        return None, *(_reduce_scatter(grad.contiguous(), ctx.group) for grad in grads)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = x.new_empty(len(x) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x, group=group)
    return own


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


def gather_tokens(parts: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Return each of the tensors with the tokens of all ranks of the group, in one all-gather.

    Backward sums each gradient over the ranks, and each rank keeps that of its own tokens.

    parts: this rank's equal part of the tokens, the first dim, in rank order; dtypes may differ.
    """
    return _GatherTokens.apply(group, *parts)


def gather_weights(chunks: Iterable[DistributedDataParallel]) -> None:
    """Wait for the weights that other copies of the model have updated.

    With parallel.overlap_parameters the next forward pass of training gathers them otherwise, so that until then each
    copy has only its own part of the step.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
