"""The teacher: the model of another folder, in the layout of the run that it teaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sse.checkpoint.reference import keep_reference
from megatron_sse.config import RunConfig, choose_layout
from megatron_sse.config.load import make_config
from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import Model, find_model, open_model

KEY = "training.distill.teacher"


@dataclass(frozen=True)
class OpenTeacher:
    """A model and the settings to build it with, which are the run's but for the model itself."""

    model: Model
    config: RunConfig


def open_teacher(config: RunConfig, resume: Path | None = None) -> OpenTeacher:
    """Open the teacher that a run names. Raises UserError where it does not fit the run.

    resume: the checkpoint that the run resumes from, whose teacher it was.
    """
    distill = config.training.distill
    assert distill is not None
    folder = keep_reference(config, KEY, find_model(KEY, distill.teacher), resume, "training.distill")
    model = open_model(KEY, folder, hashes=config.checkpoint.verify == "hashes")
    theirs, own = model.config.model, config.model
    needed = [("vocab_size", "vocab_size"), ("padded_vocab_size", "vocab_size rounded up to model.vocab_multiple")]
    if distill.hidden:
        needed += [("num_layers", "num_layers, with training.distill.hidden")]
        needed += [("hidden_size", "hidden_size, with training.distill.hidden")]
    for name, words in needed:
        if getattr(theirs, name) != getattr(own, name):
            raise UserError(
                f"{KEY}: got a model of {name} {getattr(theirs, name)}, allowed {getattr(own, name)}, the run's "
                f"model.{words}"
            )
    return OpenTeacher(model, _teacher_config(model, config))


def _teacher_config(model: Model, config: RunConfig) -> RunConfig:
    """Return the run's settings with the teacher's model. Raises UserError where it cannot be split as the run is."""
    values = config.model_dump()
    # The sequences are split in one way for both models.
    layout = "zigzag" if choose_layout(config)[0] else "contiguous"
    values["model"] = model.config.model.model_dump()
    # Of how the teacher was trained: it runs without dropout, and split as this run.
    transformer = values["model"]["transformer"]
    for name in ("hidden_dropout", "attention_dropout", "cp_comm_type"):
        transformer.pop(name, None)
    if comm_type := config.model.transformer.get("cp_comm_type"):
        transformer["cp_comm_type"] = comm_type
    values["parallel"] |= {"layout": layout if config.parallel.context > 1 else "auto"}
    values["training"] |= {"distill": None, "recompute": "none"}
    values["stages"] = None
    return make_config(values, {"": f"{KEY} {model.folder}"})
