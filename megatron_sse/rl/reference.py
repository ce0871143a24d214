"""The policy that training must not leave too far behind: the weights that the run started from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.checkpoint.folders import find_weights
from megatron_sse.checkpoint.full_weights import read_weights
from megatron_sse.checkpoint.reference import keep_reference
from megatron_sse.config import RunConfig
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.rl.packing import PolicyBatch


def find_reference(config: RunConfig, resume: Path | None) -> Path | None:
    """Return the checkpoint that holds the reference of a run; None without rl.kl.

    resume: the checkpoint that the run resumes from. Its reference stays what it was, also when the run that
    checkpoint.load_weights names has newer checkpoints by now. Raises UserError where it is gone or another, unless
    checkpoint.changed_data is accept.
    """
    if config.rl is None or not config.rl.kl:
        return None
    newest = find_weights(config)
    assert newest is not None
    return keep_reference(config, "checkpoint.load_weights", newest, resume, "rl.kl")


class Reference:
    """This rank's part of a checkpoint's weights, in host memory."""

    def __init__(self, checkpoint: Path, net: LanguageModel, groups: ProcessGroupCollection) -> None:
        self.net = net
        # All ranks have checked it together.
        weights = read_weights(checkpoint, hashes=False)
        self.parts: list[tuple[torch.nn.Parameter, Tensor]] = []
        for name, parameter in net.named_parameters():
            part = own_part(weights.get(global_name(name, net)), parameter, groups.tp.rank(), groups.tp.size())
            self.parts.append((parameter, part.to(parameter.dtype).clone()))

    @torch.no_grad()
    def score(self, batches: Sequence[PolicyBatch], temperature: float) -> None:
        """Fill in the micro-batches' reference_BL. All ranks call it."""
        was_training = self.net.training
        self.net.eval()
        self._swap()
        try:
            for batch in batches:
                batch.layout.layer_loss_scale = None
                scores = self.net(
                    batch.tokens_BL, labels=batch.labels_BL, packed_seq_params=batch.layout, temperature=temperature
                )
                batch.reference_BL = -scores.loss
        finally:
            self._swap()
            self.net.train(was_training)

    def _swap(self) -> None:
        """Exchange the model's weights and the reference's; a second call puts both back."""
        for parameter, part in self.parts:
            other = parameter.detach().to(part.device, copy=True)
            parameter.copy_(part)
            part.copy_(other)
