"""Objectives of training: the loss of a micro-batch, and the numbers that are reported with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sse.data.batch import Batch
from megatron_sse.parallel.linear_cross_entropy import TokenScores


@dataclass(frozen=True)
class MicroBatchLoss:
    """Loss of this rank's part of a micro-batch, as the last pipeline stage computes it.

    loss: summed over the counted tokens; the backward pass starts here, and Megatron-Core later divides the gradient by
    the counted tokens of all ranks. tokens: their number. sums: what is reported, by the names of Objective.sums.
    """

    loss: Tensor
    tokens: Tensor
    sums: dict[str, Tensor]


class Objective(Protocol):
    """What a run trains for; another kind of training is another class with these members.

    sums: names of the numbers that are added up over all micro-batches and ranks.
    """

    sums: tuple[str, ...]

    def forward(self, model: Any, batch: Any, training: bool) -> Any:
        """Run this stage's chunk of the model; what it returns on the last stage is passed to `loss`.

        model: the chunk in DDP. batch: a Batch, or what else the run trains on. training: False in validation, where
        more may be computed.
        """

    def loss(self, output: Any, batch: Any) -> MicroBatchLoss:
        """Turn the last stage's output into a loss."""

    def means(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        """Return what is reported, from the complete sums and the number of counted tokens: "loss" and others."""


class LanguageModelling:
    """Prediction of the next token, or of a task's answer: cross entropy in nats per counted token.

    In validation the share of the tasks' answer tokens that are the model's likeliest is counted as well ("accuracy").
    """

    sums: tuple[str, ...] = ("loss", "right", "answers")

    def forward(self, model: Any, batch: Batch, training: bool) -> Any:
        return model(
            batch.tokens_BL,
            labels=batch.labels_BL,
            packed_seq_params=batch.layout,
            likeliest=not training and batch.answers_BL is not None,
        )

    def loss(self, output: TokenScores, batch: Batch) -> MicroBatchLoss:
        loss = (output.loss * batch.loss_mask_BL).sum()
        sums = {"loss": loss.detach()}
        if output.likeliest is not None and batch.answers_BL is not None:
            right_BL = (output.likeliest == batch.labels_BL) & batch.answers_BL
            sums |= {"right": right_BL.sum(), "answers": batch.answers_BL.sum()}
        return MicroBatchLoss(loss, batch.loss_mask_BL.sum(dtype=torch.int32), sums)

    def means(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        means = {"loss": sums["loss"] / tokens if tokens else math.nan}
        if sums["answers"]:
            means["accuracy"] = sums["right"] / sums["answers"]
        return means
