"""The description of the data in a checkpoint, which shows when a run is resumed on other data or in another place."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from megatron_sse.checkpoint.manifest import Count, read_manifest
from megatron_sse.checkpoint.names import DATA
from megatron_sse.config import RunConfig, StageRun, stage_of_step
from megatron_sse.config.problem import show
from megatron_sse.data.fingerprint import describe_data
from megatron_sse.errors import SharedUserError
from megatron_sse.reading import NotFoundError, read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """A place in a stage (counted from 0): steps, samples and tokens of the stage that are done."""

    stage: Count
    steps: Count
    samples: Count
    tokens: Count

    @classmethod
    def of(cls, stage: StageRun, step: int, consumed_samples: int) -> "Position":
        """Return where `step` steps and `consumed_samples` samples of the run are in its stage."""
        samples = consumed_samples - stage.first_sample
        return cls(stage.number, step - stage.first_step, samples, samples * stage.config.data.sequence_length)

    def __str__(self) -> str:
        return (
            f"step {self.steps} of stage {self.stage + 1}, after {self.samples} of its sequences ({self.tokens} tokens)"
        )


class _File(BaseModel):
    prefix: str
    hash: str


@dataclass(frozen=True)
class SavedReference:
    """The model that a run is measured against: the reference of rl.kl, or the teacher of training.distill.

    step: of its checkpoint, 0 in other folders. hash: of what identifies it (reference.py).
    """

    step: Count
    hash: str


class SavedData(BaseModel):
    """The content of a checkpoint's DATA: the keys of describe_data, and where the run was.

    position, learning_rate (of the last step), validation_samples: None in checkpoints of versions without them.
    reference: None without such a model.
    """

    model_config = ConfigDict(extra="allow")

    files: list[_File]
    position: Position | None = None
    learning_rate: float | None = None
    validation_samples: int | None = None
    reference: SavedReference | None = None


def describe_place(stage: StageRun, step: int, consumed_samples: int, learning_rate: float) -> dict[str, Any]:
    """Return what SavedData has besides the keys of describe_data."""
    return {
        "position": asdict(Position.of(stage, step, consumed_samples)),
        "learning_rate": learning_rate,
        "validation_samples": _validation_samples(stage.config),
    }


def read_data(checkpoint: Path) -> SavedData | None:
    """Return a checkpoint's description of its data; None where it has none. Raises UserError where it is damaged."""
    try:
        return read_json(checkpoint / DATA, SavedData)
    except NotFoundError:
        return None


def check_same_data(checkpoint: Path, config: RunConfig, stages: list[StageRun]) -> None:
    """Compare the data that a checkpoint was trained on with this run's; all ranks together.

    Raises SharedUserError where they differ; only logs a warning where checkpoint.changed_data is accept. Another place
    in the stages is always an error.
    """
    every: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(every, (moved(checkpoint, config, stages), "; ".join(changed_data(checkpoint, stages))))
    if place := next((moved for moved, _ in every if moved), None):
        raise SharedUserError(place)
    text = next((changed for _, changed in every if changed), None)
    if text is None:
        return
    if config.checkpoint.changed_data == "refuse":
        raise SharedUserError(
            f"{checkpoint}: was trained on other data than this run's: {text}; restore the data and its settings, or "
            "set checkpoint.changed_data: accept to continue with another order of samples"
        )
    if dist.get_rank() == 0:
        logger.warning("%s: was trained on other data: %s; the order of samples changes", checkpoint, text)


def moved(checkpoint: Path, config: RunConfig, stages: list[StageRun]) -> str:
    """Return how the stages of this run put a checkpoint in another place than it was saved at; "" where they do not.

    A run without stages continues after the checkpoint's samples, whatever its batches were.
    """
    manifest, saved = read_manifest(checkpoint), read_data(checkpoint)
    stage = stage_of_step(stages, manifest.step)
    now = Position.of(stage, manifest.step, stage.first_sample + _samples(stage, manifest.step))
    then = saved.position if saved is not None else None
    if then is None:
        if manifest.consumed_samples < stage.first_sample:
            return _moved(checkpoint, f"{manifest.consumed_samples} sequences of the run", now)
        then = Position.of(stage, manifest.step, manifest.consumed_samples)
    if then == now or (config.stages is None and then.stage == 0):
        return ""
    return _moved(checkpoint, str(then), now)


def _samples(stage: StageRun, step: int) -> int:
    return (step - stage.first_step) * stage.config.training.global_batch_size


def _moved(checkpoint: Path, then: str, now: Position) -> str:
    return (
        f"stages: got other stages than those that {checkpoint} was saved with, at {then}; now it would be at {now}, "
        "and sequences would be skipped or seen twice; set tokens, sequence_length and global_batch_size of the stages "
        "up to this one to what they were"
    )


def warn_of_changed_schedule(checkpoint: Path, config: RunConfig, learning_rate: float) -> None:
    """Warn where this run's settings give the checkpoint's last step another learning rate, or validate on others."""
    saved = read_data(checkpoint)
    if saved is None or dist.get_rank() != 0:
        return
    if saved.learning_rate is not None and abs(saved.learning_rate - learning_rate) > 1e-9 * abs(learning_rate):
        logger.warning(
            "the learning rate jumps: the checkpoint's last step had %g, by this run's optimizer and training.steps it "
            "is %g; optimizer.schedule=constant optimizer.learning_rate=%g continues without a jump, and a run with "
            "optimizer.schedule=constant or wsd can be made longer before its learning rate falls",
            *(saved.learning_rate, learning_rate, saved.learning_rate),
        )
    now = _validation_samples(config)
    if None not in (saved.validation_samples, now) and saved.validation_samples != now:
        text = "validation losses before the resume are of %d sequences, from here on of %d"
        logger.warning(text, saved.validation_samples, now)


def _validation_samples(config: RunConfig) -> int | None:
    """Return the sequences of a validation; None with rl, which tries all held-out prompts."""
    if config.rl is not None:
        return None
    return config.training.validation_batches * config.training.global_batch_size


def changed_data(checkpoint: Path, stages: list[StageRun]) -> list[str]:
    """Return how the data of a checkpoint's last stage differs from this run's, one text for each difference.

    Files are compared by content, not by name. The list is empty where the checkpoint does not describe its data.
    Raises UserError where the description is damaged.
    """
    saved = read_data(checkpoint)
    if saved is None:
        return []
    then, now = saved.model_extra or {}, describe_data(stage_of_step(stages, read_manifest(checkpoint).step))
    found = [
        f"{key} {show(then.get(key))} then, {show(value)} now"
        for key, value in now.items()
        if key != "files" and then.get(key) != value
    ]
    for old, new in zip(saved.files, now["files"], strict=False):
        if old.hash != new["hash"]:
            found.append(f"{new['prefix']} has other contents than {old.prefix} had")
    if len(saved.files) != len(now["files"]):
        found.append(f"{len(saved.files)} files then, {len(now['files'])} now")
    return found
