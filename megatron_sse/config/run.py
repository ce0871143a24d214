"""A complete run: sections that fit together, and its length stages, each of which is a run with settings of its own.

The two are one module because they need each other: a run is valid if all its stages are, and a stage's settings are
those of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_core import PydanticCustomError

from megatron_sse.config.checks import find_problem
from megatron_sse.config.context import choose_layout
from megatron_sse.config.problem import Problem, show
from megatron_sse.config.schema import Settings, Stage

_DATA = ("sequence_length", "train")
_TRAINING = ("global_batch_size", "micro_batch_size")
_OPTIMIZER = ("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "decay_steps")


class RunConfig(Settings):
    """A checked run: an instance holds no contradiction that can be known before the start."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        problem = _derive_from_stages(self) or _derive_from_rl(self)
        if problem is None:
            if self.optimizer.decay_steps is None:
                self.optimizer.decay_steps = self.optimizer.default_decay_steps(self.training.steps)
            problem = find_problem(self) or _find_stage_problem(self)
        if problem is not None:
            raise PydanticCustomError("setting", "{key}: {text}", {"key": problem.key, "text": problem.text})
        return self


@dataclass(frozen=True)
class StageRun:
    """A stage, or the complete run where it has no stages.

    Attributes:
        train_key: the setting that names its training files.
        number: counted from 0.
        steps: number of steps in it; first_step, first_sample: steps and samples of the run before it.
        config: settings during the stage, without stages; training.steps is that of the complete run.
        own_schedule: whether the learning rate's schedule spans this stage, not the run.
    """

    train_key: str
    number: int
    steps: int
    first_step: int
    first_sample: int
    config: RunConfig
    own_schedule: bool

    @property
    def end(self) -> int:
        """Steps of the run at the end of the stage."""
        return self.first_step + self.steps


def plan_stages(config: RunConfig) -> list[StageRun]:
    """Return the stages of a run in order; without `stages` there is one, the complete run."""
    if config.stages is None:
        return [StageRun("data.train", 0, config.training.steps, 0, 0, config, own_schedule=False)]
    layout = _layout(config)
    found: list[StageRun] = []
    step = sample = 0
    for number, stage in enumerate(config.stages):
        own, steps = _stage_config(config, stage, layout), _num_steps(config, stage)
        has_schedule = stage.learning_rate is not None
        key = "data.train" if stage.train is None else f"stages.{number}.train"
        found.append(StageRun(key, number, steps, step, sample, own, has_schedule))
        step, sample = step + steps, sample + steps * own.training.global_batch_size
    return found


def stage_of_step(stages: list[StageRun], step: int) -> StageRun:
    """Return the stage of step `step` (counted from 1); after the end of the run the last one."""
    return next((stage for stage in stages if step <= stage.end), stages[-1])


def longest_stage(config: RunConfig) -> StageRun:
    """Return the first stage with the longest sequences."""
    return max(plan_stages(config), key=lambda stage: stage.config.data.sequence_length)


def _derive_from_stages(config: Settings) -> Problem | None:
    """Fill in data.sequence_length (the longest) and training.steps (the sum), which follow from the stages."""
    derived: dict[str, int | None] = {"data.sequence_length": None, "training.steps": None}
    if config.stages is not None and config.rl is not None:
        return Problem("stages", "got a list, allowed null with rl")
    if config.stages is not None:
        if not config.stages:
            return Problem("stages", "got an empty list, allowed null or one stage or more")
        derived["data.sequence_length"] = max(stage.sequence_length for stage in config.stages)
        derived["training.steps"] = sum(_num_steps(config, stage) for stage in config.stages)
    for key, value in derived.items():
        section, name = key.split(".")
        given = getattr(getattr(config, section), name)
        if given is None and value is None:
            return Problem(key, "got nothing, allowed a value, the key is required without stages")
        if given is None:
            setattr(getattr(config, section), name, value)
        elif value is not None and given != value:
            return Problem(key, f"got {show(given)}, allowed null with stages, which make it {value}")
    return None


def _derive_from_rl(config: Settings) -> Problem | None:
    """Fill in training.global_batch_size, which follows from rl; without rl it and data.train are required."""
    training, nothing = config.training, "got nothing, allowed a value, the key is required without rl"
    if config.rl is None:
        if "train" not in config.data.model_fields_set:
            return Problem("data.train", nothing)
        if not config.data.train:
            return Problem("data.train", "got [], allowed a prefix or a list of {prefix: ..., weight: ...}")
        return Problem("training.global_batch_size", nothing) if training.global_batch_size is None else None
    derived = config.rl.rollouts_per_step
    if training.global_batch_size is None:
        training.global_batch_size = derived
    elif training.global_batch_size != derived:
        text = f"got {training.global_batch_size}, allowed null with rl, whose prompts and groups make it {derived}"
        return Problem("training.global_batch_size", text)
    return None


def _find_stage_problem(config: Settings) -> Problem | None:
    """Return the first contradiction in a stage, or None."""
    for number, stage in enumerate(config.stages or []):
        key = f"stages.{number}"
        for name in _OPTIMIZER[1:]:
            if getattr(stage, name) is not None and stage.learning_rate is None:
                text = f"got {show(getattr(stage, name))}, allowed null without {key}.learning_rate"
                return Problem(f"{key}.{name}", f"{text}, which gives the stage a schedule of its own")
        if stage.rotary_base is not None and not config.model.softmax.rotary_base:
            text = f"got {show(stage.rotary_base)}, allowed null while model.softmax.rotary_base is 0"
            return Problem(f"{key}.rotary_base", text)
        try:
            _stage_config(config, stage, _layout(config))
        except ValidationError as error:
            return Problem(key, error.errors()[0]["msg"])
    return None


def _stage_config(config: Settings, stage: Stage, layout: str) -> RunConfig:
    """Return the run's settings during a stage. Raises ValidationError where they do not fit together."""
    # Validated again as a run of its own, so that a stage is checked like any other run.
    values: dict[str, Any] = config.model_dump()
    given = {name: value for name, value in stage.model_dump().items() if value is not None}
    for section, names in (("data", _DATA), ("training", _TRAINING), ("optimizer", _OPTIMIZER)):
        values[section] |= {name: given[name] for name in names if name in given}
    if "rotary_base" in given:
        values["model"]["softmax"]["rotary_base"] = given["rotary_base"]
    if "learning_rate" in given and "decay_steps" not in given:
        # The default follows from the stage's steps, not from the run's.
        optimizer = type(config.optimizer)(**values["optimizer"])
        values["optimizer"]["decay_steps"] = optimizer.default_decay_steps(_num_steps(config, stage))
    values["parallel"]["layout"] = layout
    return RunConfig.model_validate(values | {"stages": None})


def _layout(config: Settings) -> str:
    """Return parallel.layout for all stages: what suits the longest, since the model is built for one layout."""
    if config.parallel.context == 1:
        return config.parallel.layout
    return "zigzag" if choose_layout(config)[0] else "contiguous"


def _num_steps(config: Settings, stage: Stage) -> int:
    """Return the number of steps that see at least stage.tokens tokens."""
    batch = stage.global_batch_size or config.training.global_batch_size
    return -(-stage.tokens // (batch * stage.sequence_length))
