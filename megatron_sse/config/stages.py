"""Length stages: a run whose sequence length, data and learning rate change on the way.

Each stage is a run of its own settings, with its place in the whole: nothing else has to know of stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_sse.config.checks import Problem, show
from megatron_sse.config.context import choose_layout

if TYPE_CHECKING:
    from megatron_sse.config.schema import RunConfig, Stage

_DATA = ("sequence_length", "train")
_TRAINING = ("global_batch_size", "micro_batch_size")
_OPTIMIZER = ("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "decay_steps")


@dataclass(frozen=True)
class StageRun:
    """A stage, or the whole of a run without stages.

    Attributes:
        train_key: the setting of its training files.
        number: counted from 0.
        steps: that it has; first_step, first_sample: steps and samples of the run before it.
        config: settings while it lasts, without stages; training.steps is that of the whole run.
        own_schedule: the learning rate's schedule spans this stage, not the run.
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
        """Steps of the run when it is over."""
        return self.first_step + self.steps


def plan_stages(config: RunConfig) -> list[StageRun]:
    """The stages of a checked run, in order; without `stages` one that is the whole run."""
    if config.stages is None:
        return [StageRun("data.train", 0, config.training.steps, 0, 0, config, own_schedule=False)]
    layout = _layout(config)
    found: list[StageRun] = []
    step = sample = 0
    for number, stage in enumerate(config.stages):
        own, steps = _settings(config, stage, layout), _num_steps(config, stage)
        has_schedule = stage.learning_rate is not None
        key = "data.train" if stage.train is None else f"stages.{number}.train"
        found.append(StageRun(key, number, steps, step, sample, own, has_schedule))
        step, sample = step + steps, sample + steps * own.training.global_batch_size
    return found


def stage_of_step(stages: list[StageRun], step: int) -> StageRun:
    """The stage in which step `step` (counted from 1) is taken; the last one after the end."""
    return next((stage for stage in stages if step <= stage.end), stages[-1])


def longest_stage(config: RunConfig) -> StageRun:
    """The stage with the longest sequences, the first of them."""
    return max(plan_stages(config), key=lambda stage: stage.config.data.sequence_length)


def derive_from_stages(config: RunConfig) -> Problem | None:
    """Fill in data.sequence_length (the longest) and training.steps (the sum), which stages decide."""
    derived: dict[str, int | None] = {"data.sequence_length": None, "training.steps": None}
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


def find_stage_problem(config: RunConfig) -> Problem | None:
    """The first contradiction in a stage."""
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
            _settings(config, stage, _layout(config))
        except ValidationError as error:
            return Problem(key, error.errors()[0]["msg"])
    return None


def _settings(config: RunConfig, stage: Stage, layout: str) -> RunConfig:
    """The run's settings while a stage lasts. Raises ValidationError where they do not fit together."""
    values: dict[str, Any] = config.model_dump()
    given = {name: value for name, value in stage.model_dump().items() if value is not None}
    for section, names in (("data", _DATA), ("training", _TRAINING), ("optimizer", _OPTIMIZER)):
        values[section] |= {name: given[name] for name in names if name in given}
    if "rotary_base" in given:
        values["model"]["softmax"]["rotary_base"] = given["rotary_base"]
    if "learning_rate" in given and "decay_steps" not in given:
        # Of the stage's steps, not the run's.
        optimizer = type(config.optimizer)(**values["optimizer"])
        values["optimizer"]["decay_steps"] = optimizer.default_decay_steps(_num_steps(config, stage))
    values["parallel"]["layout"] = layout
    return type(config).model_validate(values | {"stages": None})


def _layout(config: RunConfig) -> str:
    """parallel.layout of all stages: what fits the longest, since the model is built for one."""
    if config.parallel.context == 1:
        return config.parallel.layout
    return "zigzag" if choose_layout(config)[0] else "contiguous"


def _num_steps(config: RunConfig, stage: Stage) -> int:
    """Steps that see at least stage.tokens tokens."""
    batch = stage.global_batch_size or config.training.global_batch_size
    return -(-stage.tokens // (batch * stage.sequence_length))
