"""The output layer and the cross entropy together, over chunks of tokens: the logits of all tokens never exist at once.

Dims are those of output_layer.py. The forward pass keeps one number per token, the logarithm of the sum of the
exponentials; the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.parallel.output_layer import OutputLayer, WeightGradient, all_tokens, compiled, sum_over_rows
from megatron_sse.parallel.vocabulary import likeliest_tokens


class TokenScores(NamedTuple):
    """What the model says about each token, in the shape of the labels.

    loss: the label's negative log-probability, fp32 (fp64 in fp64 models). likeliest: the likeliest token, int64; None
    where it was not asked for. divergence: of the model's distribution from a teacher's, in nats; None without one.
    """

    loss: Tensor
    likeliest: Tensor | None
    divergence: Tensor | None = None


def score_tokens(
    hidden_LBd: Tensor,
    weight_vd: Tensor,
    label_LB: Tensor,
    layer: OutputLayer,
    likeliest: bool = False,
    temperature: float = 1.0,
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
        temperature: divides the logits of the loss, in fp32 (fp64 in fp64 models) as in generation: after the product.
    """
    loss_T = _LinearCrossEntropy.apply(hidden_LBd.flatten(0, 1), weight_vd, label_LB.flatten(), layer, temperature)
    best_LB = None
    if likeliest:
        best_LB = _likeliest(hidden_LBd.flatten(0, 1), weight_vd, layer).view_as(label_LB)
    return TokenScores(loss_T.view_as(label_LB), best_LB)


@torch.no_grad()
def _likeliest(hidden_Td: Tensor, weight_vd: Tensor, layer: OutputLayer) -> Tensor:
    hidden_Td = all_tokens(hidden_Td, layer)
    parts = [
        likeliest_tokens(hidden_Td[chunk] @ weight_vd.t(), layer.vocab_size, layer.group)
        for chunk in layer.chunks(len(hidden_Td))
    ]
    return torch.cat(parts)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own_Td: Tensor, weight_vd: Tensor, label_T: Tensor, layer: OutputLayer, temperature: float
    ) -> Tensor:
        hidden_Td = all_tokens(own_Td, layer)
        dtype = torch.promote_types(hidden_Td.dtype, torch.float32)
        num_rows = len(weight_vd)
        place_T, is_own_T = _own_place(label_T, num_rows, layer.group.rank())
        # Of this rank's rows: the logarithm of the sum of the exponentials, and the label's logit.
        log_sum_T, logit_T = torch.empty(2, len(hidden_Td), dtype=dtype, device=hidden_Td.device)
        summarize = compiled(_summarize) if layer.fused else _summarize
        for chunk in layer.chunks(len(hidden_Td)):
            # Logits without a name, which would keep them until those of the next chunk are there.
            log_sum_T[chunk], logit_T[chunk] = summarize(
                hidden_Td[chunk] @ weight_vd.t(), place_T[chunk], layer.real_rows(num_rows), dtype, temperature
            )
        logit_T = torch.where(is_own_T, logit_T, 0.0)
        if layer.group.size() > 1:
            log_sum_T, logit_T = _join(log_sum_T, logit_T, layer.group)
        ctx.save_for_backward(own_Td, weight_vd, label_T, log_sum_T)
        ctx.layer, ctx.temperature = layer, temperature
        # Not saved as a tensor: it is the optimizer's, and changed in place by every micro-batch.
        ctx.main_grad = getattr(weight_vd, "main_grad", None)
        return log_sum_T - logit_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        own_Td, weight_vd, label_T, log_sum_T = ctx.saved_tensors
        layer: OutputLayer = ctx.layer
        hidden_Td = all_tokens(own_Td, layer)
        num_rows = len(weight_vd)
        place_T, is_own_T = _own_place(label_T, num_rows, layer.group.rank())
        label_grad_T = torch.where(is_own_T, grad_T, 0.0)
        grad_hidden_Td = torch.empty_like(hidden_Td)
        weight_grad = WeightGradient(weight_vd, ctx.main_grad, layer) if ctx.needs_input_grad[1] else None
        differentiate = compiled(_differentiate) if layer.fused else _differentiate
        for chunk in layer.chunks(len(hidden_Td)):
            place_C, log_sum_C, grad_C, label_grad_C = (
                part[chunk] for part in (place_T, log_sum_T, grad_T, label_grad_T)
            )
            of_chunk = place_C, log_sum_C, grad_C, label_grad_C, layer.real_rows(num_rows), ctx.temperature
            # Without a name here as well, so that the callee can free them.
            grad_Cv = differentiate(hidden_Td[chunk] @ weight_vd.t(), *of_chunk)
            torch.mm(grad_Cv, weight_vd, out=grad_hidden_Td[chunk])
            if weight_grad is not None:
                weight_grad.add(grad_Cv, hidden_Td[chunk])
            del grad_Cv
        grad_own_Td = sum_over_rows(grad_hidden_Td, layer) if ctx.needs_input_grad[0] else None
        return grad_own_Td, None if weight_grad is None else weight_grad.result(), None, None, None


def _summarize(
    logits_Cv: Tensor, place_C: Tensor, real: int, dtype: torch.dtype, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum of the exponentials of the first `real` logits, and the logit at `place_C`."""
    logits_Cv = _mask(_divide(logits_Cv.to(dtype), temperature), real)
    logit_C = logits_Cv.gather(1, place_C[:, None])[:, 0]
    # A rank whose rows are all padding has no largest logit: its sum is 0.
    most_C = logits_Cv.amax(1).clamp(min=torch.finfo(dtype).min)
    sum_C = logits_Cv.sub_(most_C[:, None]).exp_().sum(1)
    return most_C + sum_C.log(), logit_C


def _differentiate(
    logits_Cv: Tensor,
    place_C: Tensor,
    log_sum_C: Tensor,
    grad_C: Tensor,
    label_grad_C: Tensor,
    real: int,
    temperature: float,
) -> Tensor:
    """Return the gradient of the logits, in their dtype: (softmax - label) times the gradient of the loss."""
    dtype = logits_Cv.dtype
    logits_Cv = _mask(_divide(logits_Cv.to(log_sum_C.dtype), temperature), real)
    grad_Cv = logits_Cv.sub_(log_sum_C[:, None]).exp_().mul_(grad_C[:, None])
    # label_grad_C is 0 where another rank holds the label.
    return _divide(grad_Cv.scatter_add_(1, place_C[:, None], -label_grad_C[:, None]), temperature).to(dtype)


def _divide(x_Cv: Tensor, temperature: float) -> Tensor:
    """Divide logits or their gradients by the temperature, in place."""
    return x_Cv if temperature == 1 else x_Cv.div_(temperature)


def _mask(logits_Cv: Tensor, real: int) -> Tensor:
    """Set the logits of rows that pad the vocabulary to -inf, in place."""
    if real < logits_Cv.shape[1]:
        logits_Cv[:, real:] = -torch.inf
    return logits_Cv


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
