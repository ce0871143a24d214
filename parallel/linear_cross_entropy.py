"""The output layer and the cross entropy together, over chunks of tokens: the logits of all tokens never exist at once.

Rows of the output layer's weight are split over a tensor group. Here v counts this rank's rows, T the tokens of its
context rank, and C those of a chunk. The forward pass keeps one number per token, the logarithm of the sum of the
exponentials; the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.parallel.vocabulary import likeliest_tokens


@dataclass(frozen=True)
class OutputLayer:
    """How the output layer is split, and how it is computed.

    Attributes:
        vocab_size: tokens of the vocabulary; later rows of the weight pad it and take no part.
        group: the tensor ranks that hold its rows.
        sequence_parallel: whether each of them holds a part of the tokens.
        chunk: tokens whose logits exist at the same time.
        fused: whether operations on logits are compiled into few kernels.
        accumulate: whether the weight's gradient is added to `main_grad` by NVIDIA Apex's kernel, in the product.
    """

    vocab_size: int
    group: dist.ProcessGroup
    sequence_parallel: bool = False
    chunk: int = 1024
    fused: bool = False
    accumulate: bool = False

    def real_rows(self, num_rows: int) -> int:
        """Return how many of this rank's `num_rows` rows belong to tokens."""
        return min(max(self.vocab_size - self.group.rank() * num_rows, 0), num_rows)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield chunks of nearly equal size, so that compiled operations see one shape, or two."""
        count = -(-num_tokens // self.chunk)
        size = -(-num_tokens // count)
        return (slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size))


class TokenScores(NamedTuple):
    """What the model says about each token, in the shape of the labels.

    loss: the label's negative log-probability, fp32 (fp64 in fp64 models). likeliest: the likeliest token, int64; None
    where it was not asked for.
    """

    loss: Tensor
    likeliest: Tensor | None


def score_tokens(
    hidden_LBd: Tensor, weight_vd: Tensor, label_LB: Tensor, layer: OutputLayer, likeliest: bool = False
) -> TokenScores:
    """Return the loss of every token; differentiable in `hidden_LBd` and `weight_vd`.

    The weight's gradient is added to `weight_vd.main_grad` where there is one, as Megatron-Core's own layers do, and is
    summed in fp32 over the chunks in any case.

    Args:
        hidden_LBd: input of the output layer, the same on all tensor ranks, or under sequence parallelism this rank's
            part of L.
        weight_vd: this rank's rows.
        label_LB: int64, of all tokens of the context rank.
        likeliest: also return the likeliest tokens (without a gradient).
    """
    loss_T = _LinearCrossEntropy.apply(hidden_LBd.flatten(0, 1), weight_vd, label_LB.flatten(), layer)
    best_LB = None
    if likeliest:
        best_LB = _likeliest(hidden_LBd.flatten(0, 1), weight_vd, layer).view_as(label_LB)
    return TokenScores(loss_T.view_as(label_LB), best_LB)


@torch.no_grad()
def _likeliest(hidden_Td: Tensor, weight_vd: Tensor, layer: OutputLayer) -> Tensor:
    hidden_Td = _all_tokens(hidden_Td, layer)
    parts = [
        likeliest_tokens(hidden_Td[chunk] @ weight_vd.t(), layer.vocab_size, layer.group)
        for chunk in layer.chunks(len(hidden_Td))
    ]
    return torch.cat(parts)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_Td: Tensor, weight_vd: Tensor, label_T: Tensor, layer: OutputLayer) -> Tensor:
        hidden_Td = _all_tokens(own_Td, layer)
        dtype = torch.promote_types(hidden_Td.dtype, torch.float32)
        num_rows = len(weight_vd)
        place_T, is_own_T = _own_place(label_T, num_rows, layer.group.rank())
        # Of this rank's rows: the logarithm of the sum of the exponentials, and the label's logit.
        log_sum_T, logit_T = torch.empty(2, len(hidden_Td), dtype=dtype, device=hidden_Td.device)
        summarize = _compiled(_summarize) if layer.fused else _summarize
        for chunk in layer.chunks(len(hidden_Td)):
            found = summarize(hidden_Td[chunk] @ weight_vd.t(), place_T[chunk], layer.real_rows(num_rows), dtype)
            log_sum_T[chunk], logit_T[chunk] = found
        logit_T = torch.where(is_own_T, logit_T, 0.0)
        if layer.group.size() > 1:
            log_sum_T, logit_T = _join(log_sum_T, logit_T, layer.group)
        ctx.save_for_backward(own_Td, weight_vd, label_T, log_sum_T)
        ctx.layer = layer
        # Not saved as a tensor: it is the optimizer's, and changed in place by every micro-batch.
        ctx.main_grad = getattr(weight_vd, "main_grad", None)
        return log_sum_T - logit_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        own_Td, weight_vd, label_T, log_sum_T = ctx.saved_tensors
        layer: OutputLayer = ctx.layer
        hidden_Td = _all_tokens(own_Td, layer)
        num_rows = len(weight_vd)
        place_T, is_own_T = _own_place(label_T, num_rows, layer.group.rank())
        label_grad_T = torch.where(is_own_T, grad_T, 0.0)
        grad_hidden_Td = torch.empty_like(hidden_Td)
        weight_grad = _WeightGradient(weight_vd, ctx.main_grad, layer) if ctx.needs_input_grad[1] else None
        differentiate = _compiled(_differentiate) if layer.fused else _differentiate
        for chunk in layer.chunks(len(hidden_Td)):
            place_C, log_sum_C, grad_C, label_grad_C = (
                part[chunk] for part in (place_T, log_sum_T, grad_T, label_grad_T)
            )
            # Without a name, so that the callee can free them.
            grad_Cv = differentiate(
                hidden_Td[chunk] @ weight_vd.t(), place_C, log_sum_C, grad_C, label_grad_C, layer.real_rows(num_rows)
            )
            torch.mm(grad_Cv, weight_vd, out=grad_hidden_Td[chunk])
            if weight_grad is not None:
                weight_grad.add(grad_Cv, hidden_Td[chunk])
            del grad_Cv
        grad_own_Td = _sum_over_rows(grad_hidden_Td, layer) if ctx.needs_input_grad[0] else None
        return grad_own_Td, None if weight_grad is None else weight_grad.result(), None, None


class _WeightGradient:
    """The gradient of this rank's rows, summed over chunks in fp32: in Megatron's `main_grad`, or in a tensor."""

    def __init__(self, weight_vd: Tensor, main_grad: Tensor | None, layer: OutputLayer):
        self.weight, self.layer = weight_vd, layer
        self.is_main = main_grad is not None
        dtype = torch.promote_types(weight_vd.dtype, torch.float32)
        self.sum_vd = torch.zeros_like(weight_vd, dtype=dtype) if main_grad is None else main_grad

    def add(self, grad_Cv: Tensor, hidden_Cd: Tensor) -> None:
        if self.layer.accumulate and self.is_main:
            import fused_weight_gradient_mlp_cuda

            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden_Cd, grad_Cv, self.sum_vd)
        elif grad_Cv.dtype == self.sum_vd.dtype:
            self.sum_vd.addmm_(grad_Cv.t(), hidden_Cd)
        else:
            self.sum_vd += grad_Cv.t() @ hidden_Cd

    def result(self) -> Tensor:
        """Return what autograd takes for the gradient."""
        if not self.is_main:
            return self.sum_vd.to(self.weight.dtype)
        # Megatron-Core's mark for DDP, which then leaves the gradient that autograd has alone; with zero_out_wgrad
        # (tied embeddings on one stage) it adds it, since the embedding's own gradient is in it.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.zeros_like(self.weight)


def _summarize(logits_Cv: Tensor, place_C: Tensor, real: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum of the exponentials of the first `real` logits, and the logit at `place_C`."""
    logits_Cv = _mask(logits_Cv.to(dtype), real)
    logit_C = logits_Cv.gather(1, place_C[:, None])[:, 0]
    # A rank whose rows are all padding has no largest logit: its sum is 0.
    most_C = logits_Cv.amax(1).clamp(min=torch.finfo(dtype).min)
    sum_C = logits_Cv.sub_(most_C[:, None]).exp_().sum(1)
    return most_C + sum_C.log(), logit_C


def _differentiate(
    logits_Cv: Tensor, place_C: Tensor, log_sum_C: Tensor, grad_C: Tensor, label_grad_C: Tensor, real: int
) -> Tensor:
    """Return the gradient of the logits, in their dtype: (softmax - label) times the gradient of the loss."""
    dtype = logits_Cv.dtype
    logits_Cv = _mask(logits_Cv.to(log_sum_C.dtype), real)
    grad_Cv = logits_Cv.sub_(log_sum_C[:, None]).exp_().mul_(grad_C[:, None])
    # label_grad_C is 0 where another rank holds the label.
    return grad_Cv.scatter_add_(1, place_C[:, None], -label_grad_C[:, None]).to(dtype)


def _mask(logits_Cv: Tensor, real: int) -> Tensor:
    """Set the logits of rows that pad the vocabulary to -inf, in place."""
    if real < logits_Cv.shape[1]:
        logits_Cv[:, real:] = -torch.inf
    return logits_Cv


@functools.cache
def _compiled(function: Any) -> Any:
    """Return the function with its operations fused."""
    return torch.compile(function)


def _own_place(label_T: Tensor, num_rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return each label's row on this rank (0 where another rank holds it), and whether it is here."""
    place_T = label_T - rank * num_rows
    is_own_T = (place_T >= 0) & (place_T < num_rows)
    return torch.where(is_own_T, place_T, 0), is_own_T


def _join(log_sum_T: Tensor, logit_T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return both over the rows of all ranks. Two collectives, whatever the number of chunks."""
    most_T = log_sum_T.clone()
    dist.all_reduce(most_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack(((log_sum_T - most_T).exp(), logit_T))
    dist.all_reduce(sums_2T, group=group)
    return most_T + sums_2T[0].log(), sums_2T[1]


def _all_tokens(own_Td: Tensor, layer: OutputLayer) -> Tensor:
    """Return all tokens' rows, of which each tensor rank holds a part under sequence parallelism."""
    if not layer.sequence_parallel:
        return own_Td
    all_Td = own_Td.new_empty(len(own_Td) * layer.group.size(), own_Td.shape[1])
    dist.all_gather_into_tensor(all_Td, own_Td.contiguous(), group=layer.group)
    return all_Td


def _sum_over_rows(grad_Td: Tensor, layer: OutputLayer) -> Tensor:
    """Sum what each tensor rank's rows give to the gradient; return this rank's tokens."""
    if not layer.sequence_parallel:
        if layer.group.size() > 1:
            dist.all_reduce(grad_Td, group=layer.group)
        return grad_Td
    own_Td = grad_Td.new_empty(len(grad_Td) // layer.group.size(), grad_Td.shape[1])
    dist.reduce_scatter_tensor(own_Td, grad_Td, group=layer.group)
    return own_Td
