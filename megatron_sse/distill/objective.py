"""The loss of distillation, behind the trainer's interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import DistillConfig
from megatron_sse.data.batch import Batch
from megatron_sse.distill.layers import LayerDistances
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.linear_cross_entropy import TokenScores
from megatron_sse.parallel.linear_divergence import Teacher
from megatron_sse.training.objective import LanguageModelling, MicroBatchLoss


class Distillation(LanguageModelling):
    """Language modelling, and the divergence from a teacher's distributions and layers' outputs.

    Trained is on distill.labels times the cross entropy of the labels, plus distill.logits times the divergence of the
    distributions (at a temperature, times its square: Hinton et al., arXiv 1503.02531), plus distill.hidden times the
    layers' distances. Reported are "loss", which is the cross entropy alone, so that it compares with other runs',
    "divergence" in nats per token and "hidden".

    student: this rank's chunk of the model, without DDP. loss_scale: returns what the trainer multiplies losses by.
    """

    sums = (*LanguageModelling.sums, "divergence", "hidden")

    def __init__(
        self,
        distill: DistillConfig,
        teacher: LanguageModel,
        student: LanguageModel,
        groups: ProcessGroupCollection,
        loss_scale: Callable[[], Tensor],
    ) -> None:
        self.distill, self.teacher = distill, teacher
        self.layers = None
        if distill.hidden:
            scale = distill.hidden / len(student.decoder.layers)
            self.layers = LayerDistances(teacher, student, groups, lambda: scale * loss_scale())

    def forward(self, model: Any, batch: Batch, training: bool) -> Any:
        return super().forward(partial(model, teacher=self._ask(batch)), batch, training)

    def loss(self, output: TokenScores, batch: Batch) -> MicroBatchLoss:
        assert output.divergence is not None
        found = super().loss(output, batch)
        divergence = (output.divergence * batch.loss_mask_BL).sum()
        loss = self.distill.labels * found.loss
        if self.distill.logits:
            loss = loss + self.distill.logits * self.distill.temperature**2 * divergence
        sums = found.sums | {"divergence": divergence.detach()}
        if self.layers is not None:
            sums["hidden"] = self.layers.mean()
        return MicroBatchLoss(loss, found.tokens, sums)

    def means(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        means = super().means(sums, tokens)
        if tokens:
            means["divergence"] = sums["divergence"] / tokens
            if self.layers is not None:
                means["hidden"] = sums["hidden"] / tokens
        return means

    @torch.no_grad()
    def _ask(self, batch: Batch) -> Teacher:
        """Run the teacher on a micro-batch."""
        hidden_LBe = self.teacher.hidden_states(batch.tokens_BL, batch.layout)
        if self.layers is not None:
            self.layers.start(batch.loss_mask_BL)
        return Teacher(hidden_LBe, self.teacher.output_weight(), self.distill.temperature)
