"""How far the outputs of a model's layers are from those of the teacher's layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.router import AttachLoss


class LayerDistances:
    """The mean square distance of each layer's output from the teacher's, over the teacher's own mean square.

    The distance of a layer is attached to its output, as its balance loss is, so that layers may be recomputed. The
    teacher runs first; its outputs of a micro-batch are kept until the next one, or `release`.

    scale: returns what a layer's distance, summed over the counted tokens, is multiplied by in the loss.
    """

    def __init__(
        self,
        teacher: LanguageModel,
        student: LanguageModel,
        groups: ProcessGroupCollection,
        scale: Callable[[], Tensor],
    ) -> None:
        self.scale, self.group = scale, groups.tp
        # Under sequence parallelism each tensor rank has a part of the tokens.
        self.num_parts = groups.tp.size() if student.config.sequence_parallel else 1
        self.mask_LB: Tensor | None = None
        self.wanted: dict[int, Tensor] = {}
        self.found: dict[int, Tensor] = {}
        for number, layer in enumerate(teacher.decoder.layers):
            layer.register_forward_hook(partial(self._keep, number))
        for number, layer in enumerate(student.decoder.layers):
            layer.register_forward_hook(partial(self._compare, number))

    def start(self, loss_mask_BL: Tensor) -> None:
        """Begin a micro-batch, after the teacher's pass and before the student's."""
        part = self.group.rank() if self.num_parts > 1 else 0
        self.mask_LB = loss_mask_BL.t().chunk(self.num_parts)[part]

    def mean(self) -> Tensor:
        """Return the mean over layers of the distances, summed over the context rank's counted tokens."""
        mean = torch.stack(list(self.found.values())).mean()
        if self.num_parts > 1:
            dist.all_reduce(mean, group=self.group)
        return mean

    def release(self) -> None:
        """Drop the teacher's outputs."""
        self.wanted.clear()

    def _keep(self, number: int, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        self.wanted[number] = output[0].detach()

    def _compare(self, number: int, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden_LBd, *others = output
        assert self.mask_LB is not None
        distance = _Distance.apply(hidden_LBd, self.wanted[number], self.mask_LB)
        self.found[number] = distance.detach()
        return (AttachLoss.apply(hidden_LBd, distance, self.scale().to(distance)), *others)


class _Distance(torch.autograd.Function):
    """The sum over tokens of mask |x - wanted|^2 / |wanted|^2; what is kept for the backward pass is there anyhow."""

    @staticmethod
    def forward(ctx: Any, x_LBd: Tensor, wanted_LBd: Tensor, mask_LB: Tensor) -> Tensor:
        dtype = torch.promote_types(x_LBd.dtype, torch.float32)
        size_LB = wanted_LBd.to(dtype).square().sum(-1)
        # Outputs of zeros, such as those of a token without an embedding, have no size to compare with.
        weight_LB = torch.where(size_LB > 0, mask_LB / size_LB, 0.0).to(dtype)
        ctx.save_for_backward(x_LBd, wanted_LBd, weight_LB)
        return ((x_LBd.to(dtype) - wanted_LBd.to(dtype)).square().sum(-1) * weight_LB).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x_LBd, wanted_LBd, weight_LB = ctx.saved_tensors
        gap_LBd = x_LBd.to(weight_LB.dtype) - wanted_LBd.to(weight_LB.dtype)
        return (gap_LBd * (2 * grad * weight_LB)[..., None]).to(x_LBd.dtype), None, None
