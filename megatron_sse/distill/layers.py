"""How far the outputs of a model's layers are from those of the teacher's layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.router import AttachLoss


class LayerDistances:
    """The mean square distance of each layer's output from the teacher's, over the teacher's own mean square.

    The distance of a layer is attached to its output, as its balance loss is, so that layers may be recomputed. The
    teacher runs first: its outputs of the micro-batch are kept until the next one.

    scale: returns what a layer's distance, summed over the counted tokens, is multiplied by in the loss.
    """

    def __init__(
        self,
        teacher: LanguageModel,
        student: LanguageModel,
        groups: ProcessGroupCollection,
        scale: Callable[[], Tensor],
    ) -> None:
        self.scale = scale
        # Under sequence parallelism each tensor rank has a part of the tokens.
        self.num_parts = groups.tp.size() if student.config.sequence_parallel else 1
        self.part = groups.tp.rank() if self.num_parts > 1 else 0
        self.mask_LB: Tensor | None = None
        self.wanted: list[Tensor | None] = [None] * len(teacher.decoder.layers)
        self.found: list[Tensor | None] = [None] * len(student.decoder.layers)
        for number, layer in enumerate(teacher.decoder.layers):
            layer.register_forward_hook(partial(self._keep, number))
        for number, layer in enumerate(student.decoder.layers):
            layer.register_forward_hook(partial(self._compare, number))

    def start(self, loss_mask_BL: Tensor) -> None:
        """Begin a micro-batch, after the teacher's pass and before the student's."""
        self.mask_LB = loss_mask_BL.t().chunk(self.num_parts)[self.part]

    def mean(self) -> Tensor:
        """Return the mean over layers of the distances, summed over this rank's counted tokens."""
        return torch.stack([distance for distance in self.found if distance is not None]).mean()

    def _keep(self, number: int, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        self.wanted[number] = output[0].detach()

    def _compare(self, number: int, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden_LBd, *others = output
        wanted_LBd = self.wanted[number]
        assert wanted_LBd is not None and self.mask_LB is not None
        dtype = torch.promote_types(hidden_LBd.dtype, torch.float32)
        wanted_LBd = wanted_LBd.to(dtype)
        # A teacher's output of zeros has no size to compare with.
        size_LB = wanted_LBd.square().mean(-1).clamp(min=torch.finfo(dtype).tiny)
        distance_LB = (hidden_LBd.to(dtype) - wanted_LBd).square().mean(-1) / size_LB
        distance = (distance_LB * self.mask_LB).sum()
        self.found[number] = distance.detach()
        return (AttachLoss.apply(hidden_LBd, distance, self.scale().to(distance)), *others)
