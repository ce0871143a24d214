"""The loss of GRPO and its relatives, behind the trainer's interface."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.config import RLConfig
from megatron_sse.parallel.linear_cross_entropy import TokenScores
from megatron_sse.rl.packing import PolicyBatch
from megatron_sse.rl.routing import Replay
from megatron_sse.training.objective import MicroBatchLoss


class PolicyObjective:
    """Gain of the answers' advantages, with the ratio to the policy that generated them kept near 1.

    Reported are the loss, "kl" (to the reference, k3, nats per token), "clipped" (share of tokens whose ratio is cut
    off) and "error": how far log-probabilities are from those when the answers were generated, the mean over tokens of
    exp |difference|. Before the first update of a step that is what generation and training compute differently.

    group: the context ranks, over which the tokens of an answer may be split. replay: picks partitions again.
    """

    sums: tuple[str, ...] = ("loss", "kl", "clipped", "error")

    def __init__(self, rl: RLConfig, group: dist.ProcessGroup, replay: Replay | None = None) -> None:
        self.rl, self.group, self.replay = rl, group, replay

    def forward(self, model: Any, batch: PolicyBatch, training: bool) -> Any:
        if self.replay is not None:
            # Without pipeline stages, the backward pass follows before the next micro-batch.
            self.replay.picks_BLMP = batch.picks_BLMP
        return model(
            batch.tokens_BL, labels=batch.labels_BL, packed_seq_params=batch.layout, temperature=self.rl.temperature
        )

    def loss(self, output: TokenScores, batch: PolicyBatch) -> MicroBatchLoss:
        counts_BL = batch.loss_mask_BL > 0
        # Elsewhere differences of 0: what is there may be anything.
        logp_BL = torch.where(counts_BL, -output.loss, batch.old_BL)
        change_BL = logp_BL - batch.old_BL
        ratio_BL = (self._sequence_change(change_BL, batch) if self.rl.algorithm == "gspo" else change_BL).exp()
        advantage_BL = batch.advantage_BL
        near_BL = ratio_BL.clamp(1 - self.rl.clip, 1 + self.rl.upper_clip)
        gain_BL = torch.minimum(ratio_BL * advantage_BL, near_BL * advantage_BL)
        sums = {
            "clipped": (counts_BL & (near_BL * advantage_BL < ratio_BL * advantage_BL)).sum(),
            "error": (change_BL.detach().abs().exp() * counts_BL).sum(),
        }
        if batch.reference_BL is not None:
            away_BL = torch.where(counts_BL, batch.reference_BL - logp_BL, 0.0)
            kl_BL = away_BL.exp() - away_BL - 1
            gain_BL = gain_BL - self.rl.kl * kl_BL
            sums["kl"] = kl_BL.detach().sum()
        loss = -(gain_BL * batch.weight_BL * counts_BL).sum()
        return MicroBatchLoss(loss, counts_BL.sum(dtype=torch.int32), {"loss": loss.detach(), **sums})

    def means(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        return {name: sums[name] / tokens if tokens else math.nan for name in self.sums}

    def _sequence_change(self, change_BL: Tensor, batch: PolicyBatch) -> Tensor:
        """Return the mean change of each token's answer, with the gradient of the token's own change.

        Summed over the answer's tokens with weights 1 / length, that is the gradient of the mean (GSPO, arXiv
        2507.18071, section 4.3).
        """
        share_BL = torch.where(batch.loss_mask_BL > 0, change_BL.detach() / batch.length_BL.clamp(min=1), 0.0)
        mean = share_BL.new_zeros(batch.num_answers).index_add(0, batch.answer_BL.flatten(), share_BL.flatten())
        if self.group.size() > 1:
            dist.all_reduce(mean, group=self.group)
        return mean[batch.answer_BL] + change_BL - change_BL.detach()
