"""How far a model's distributions are from a teacher's, over chunks of tokens: all tokens' logits never exist at once.

Dims are those of output_layer.py; e is the teacher's hidden size. The forward pass keeps two numbers per token, the
logarithms of both models' sums of exponentials; the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.parallel.output_layer import OutputLayer, WeightGradient, all_tokens, compiled, sum_over_rows


@dataclass(frozen=True)
class Teacher:
    """A teacher's view of the same tokens.

    hidden: input of its output layer, [L, B, e], of the same tokens as the model's. weight: its output layer's rows on
    this rank, those of the same tokens of the vocabulary as the model's. temperature: divides the logits of both.
    """

    hidden_LBe: Tensor
    weight_ve: Tensor
    temperature: float = 1.0


def diverge(hidden_LBd: Tensor, weight_vd: Tensor, teacher: Teacher, layer: OutputLayer) -> Tensor:
    """Return the divergence sum_v p_v log(p_v / q_v) of every token, p the teacher's and q the model's distribution.

    Differentiable in `hidden_LBd` and `weight_vd`, as linear_cross_entropy.score_tokens is; the teacher is a constant.

    Args:
        hidden_LBd: input of the output layer, the same on all tensor ranks, or under sequence parallelism this rank's
            part of L.
        weight_vd: this rank's rows.

    Returns:
        nats, fp32 (fp64 in fp64 models), [L, B] of all tokens of the context rank.
    """
    teacher_Te = teacher.hidden_LBe.detach().flatten(0, 1)
    found_T = _LinearDivergence.apply(
        hidden_LBd.flatten(0, 1), weight_vd, teacher_Te, teacher.weight_ve.detach(), teacher.temperature, layer
    )
    return found_T.view(-1, hidden_LBd.shape[1])


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own_Td: Tensor,
        weight_vd: Tensor,
        teacher_Te: Tensor,
        weight_ve: Tensor,
        temperature: float,
        layer: OutputLayer,
    ) -> Tensor:
        hidden_Td, hidden_Te = all_tokens(own_Td, layer), all_tokens(teacher_Te, layer)
        dtype = torch.promote_types(hidden_Td.dtype, torch.float32)
        real = layer.real_rows(len(weight_vd))
        # Of this rank's rows: the largest logits, model and teacher; then the sums of _compare.
        most_2T = torch.empty(2, len(hidden_Td), dtype=dtype, device=hidden_Td.device)
        sums_3T = torch.empty(3, len(hidden_Td), dtype=dtype, device=hidden_Td.device)
        compare = compiled(_compare) if layer.fused else _compare
        for chunk in layer.chunks(len(hidden_Td)):
            # Logits without a name, which would keep them until those of the next chunk are there.
            most_2T[:, chunk], sums_3T[:, chunk] = compare(
                hidden_Td[chunk] @ weight_vd.t(), hidden_Te[chunk] @ weight_ve.t(), real, temperature, dtype
            )
        if layer.group.size() > 1:
            most_2T, sums_3T = _join(most_2T, sums_3T, layer.group)
        log_sum_T, teacher_log_sum_T = most_2T + sums_3T[:2].log()
        ctx.save_for_backward(own_Td, weight_vd, teacher_Te, weight_ve, log_sum_T, teacher_log_sum_T)
        ctx.temperature, ctx.layer = temperature, layer
        # Not saved as a tensor: it is the optimizer's, and changed in place by every micro-batch.
        ctx.main_grad = getattr(weight_vd, "main_grad", None)
        return sums_3T[2] / sums_3T[1] - teacher_log_sum_T + log_sum_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        own_Td, weight_vd, teacher_Te, weight_ve, *log_sums = ctx.saved_tensors
        layer: OutputLayer = ctx.layer
        hidden_Td, hidden_Te = all_tokens(own_Td, layer), all_tokens(teacher_Te, layer)
        real = layer.real_rows(len(weight_vd))
        grad_hidden_Td = torch.empty_like(hidden_Td)
        weight_grad = WeightGradient(weight_vd, ctx.main_grad, layer) if ctx.needs_input_grad[1] else None
        differentiate = compiled(_differentiate) if layer.fused else _differentiate
        for chunk in layer.chunks(len(hidden_Td)):
            log_sum_C, teacher_log_sum_C = (log_sum_T[chunk] for log_sum_T in log_sums)
            of_chunk = log_sum_C, teacher_log_sum_C, grad_T[chunk], real, ctx.temperature
            grad_Cv = differentiate(hidden_Td[chunk] @ weight_vd.t(), hidden_Te[chunk] @ weight_ve.t(), *of_chunk)
            torch.mm(grad_Cv, weight_vd, out=grad_hidden_Td[chunk])
            if weight_grad is not None:
                weight_grad.add(grad_Cv, hidden_Td[chunk])
            del grad_Cv
        grad_own_Td = sum_over_rows(grad_hidden_Td, layer) if ctx.needs_input_grad[0] else None
        return grad_own_Td, None if weight_grad is None else weight_grad.result(), None, None, None, None


def _compare(
    logits_Cv: Tensor, teacher_Cv: Tensor, real: int, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the largest logits [2, C] of the model and of the teacher, and sums over the rows [3, C].

    The sums: exponentials of what the logits are below the largest, of the model and of the teacher; and the teacher's
    times how far its logit is above the model's.
    """
    logits_Cv = _scale(logits_Cv, real, temperature, dtype)
    teacher_Cv = _scale(teacher_Cv, real, temperature, dtype)
    most_2C = torch.stack((logits_Cv.amax(1), teacher_Cv.amax(1)))
    gap_Cv = teacher_Cv - logits_Cv
    sum_C = logits_Cv.sub_(most_2C[0, :, None]).exp_().sum(1)
    exp_Cv = teacher_Cv.sub_(most_2C[1, :, None]).exp_()
    return most_2C, torch.stack((sum_C, exp_Cv.sum(1), gap_Cv.mul_(exp_Cv).sum(1)))


def _differentiate(
    logits_Cv: Tensor,
    teacher_Cv: Tensor,
    log_sum_C: Tensor,
    teacher_log_sum_C: Tensor,
    grad_C: Tensor,
    real: int,
    temperature: float,
) -> Tensor:
    """Return the gradient of the model's logits, in their dtype: (q - p) / temperature times that of the divergence."""
    dtype = logits_Cv.dtype
    logits_Cv = _scale(logits_Cv, real, temperature, log_sum_C.dtype)
    teacher_Cv = _scale(teacher_Cv, real, temperature, log_sum_C.dtype)
    grad_Cv = logits_Cv.sub_(log_sum_C[:, None]).exp_().sub_(teacher_Cv.sub_(teacher_log_sum_C[:, None]).exp_())
    return grad_Cv.mul_((grad_C / temperature)[:, None]).to(dtype)


def _scale(logits_Cv: Tensor, real: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return the logits divided by the temperature, those of rows that pad the vocabulary as small as can be.

    Not -inf: differences of two stay numbers, also on a rank whose rows are all padding.
    """
    logits_Cv = logits_Cv.to(dtype) / temperature
    logits_Cv[:, real:] = torch.finfo(dtype).min
    return logits_Cv


def _join(most_2T: Tensor, sums_3T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return both over the rows of all ranks. Two collectives, whatever the number of chunks."""
    all_2T = most_2T.clone()
    dist.all_reduce(all_2T, op=dist.ReduceOp.MAX, group=group)
    share_T, teacher_share_T = (most_2T - all_2T).exp()
    sums_3T = sums_3T * torch.stack((share_T, teacher_share_T, teacher_share_T))
    dist.all_reduce(sums_3T, group=group)
    return all_2T, sums_3T
