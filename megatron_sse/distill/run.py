"""A run that trains a model beside a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sse.checkpoint.data import SavedReference
from megatron_sse.checkpoint.folders import find_all_damage, find_checkpoints
from megatron_sse.checkpoint.reference import describe_reference
from megatron_sse.config import RunConfig, StageRun
from megatron_sse.data.batch import Batch
from megatron_sse.distill.objective import Distillation
from megatron_sse.distill.teacher import KEY, OpenTeacher, open_teacher
from megatron_sse.errors import SharedUserError, found_by_machine
from megatron_sse.lease import Lease
from megatron_sse.pretrained.network import build_and_load
from megatron_sse.training.loop import Run, train
from megatron_sse.training.step import StepResult


def distill(config: RunConfig, lease: Lease | None = None) -> int:
    """Run the distillation that `config` describes; as training.loop.train. Raises UserError."""
    with found_by_machine():
        # A damaged one is passed over when the run resumes, too.
        intact = (path for path in find_checkpoints(config) if not find_all_damage(path, hashes=False))
        teacher = open_teacher(config, next(intact, None))
    return train(config, lease, partial(DistillRun, teacher))  # type: ignore[arg-type]


class DistillRun(Run):
    """A run with a teacher, whose weights are on the device, too."""

    def __init__(self, teacher: OpenTeacher, config: RunConfig, *others: Any) -> None:
        super().__init__(config, *others)
        self.teacher = describe_reference(teacher.model.folder)
        check_same_teacher(teacher.model.folder, self.teacher)
        assert config.training.distill is not None
        [chunk] = self.trainer.chunks
        net = build_and_load(teacher.model, teacher.config, self.groups, self.device, core_attention=None)
        net.requires_grad_(False)
        optimizer = self.trainer.optimizer
        self.trainer.objective = Distillation(
            config.training.distill, net, chunk.module, self.groups, optimizer.get_loss_scale
        )

    def _describe_data(self, stage: StageRun) -> dict[str, Any]:
        return super()._describe_data(stage) | {"reference": asdict(self.teacher)}

    def _take_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        result = super()._take_step(step, batches)
        objective = self.trainer.objective
        assert isinstance(objective, Distillation)
        if objective.layers is not None:
            objective.layers.release()
        names = [name for name in ("divergence", "hidden") if name in result.losses]
        is_due = step % self.config.monitor.log_interval == 0 or step == self.config.training.steps
        line = " | ".join(f"{name} {result.losses[name]:.4f}" for name in names)
        if is_due and names:
            self.monitor.report(step, {f"distill/{name}": result.losses[name] for name in names}, line)
        return result


def check_same_teacher(folder: Path, described: SavedReference) -> None:
    """Check that all ranks have the same teacher: its run may have saved a checkpoint between two of them.

    Collective over all ranks. Raises SharedUserError.
    """
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (str(folder), described))
    for name, other in every:
        if other != every[0][1]:
            raise SharedUserError(
                f"{KEY}: got {every[0][0]} on one process and {name} on another, allowed the same model on all; name "
                "a checkpoint in place of a run that goes on"
            )
