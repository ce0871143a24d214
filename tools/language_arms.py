"""The arms of the study of language modelling: settings on top of configs/language_study.yaml, or a larger one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sse.config import SSEConfig, load_config
from megatron_sse.errors import UserError
from megatron_sse.tools.studies.sizes import check_parameters, match_parameters, num_parameters

BASE = "n4k1"
# Each arm is trained with these, one seed each; the best of them gets more seeds.
LEARNING_RATES = (4e-3, 1.2e-2)


@dataclass(frozen=True)
class Arm:
    """A model of the study, with as many parameters as BASE through the width of its MLP.

    label: its name in tables and pictures. overrides: makes the settings on top of the file's of the file's model.sse.
    """

    label: str
    overrides: Callable[[SSEConfig], list[str]]


def _softmax(sse: SSEConfig) -> list[str]:
    # model.sse is empty because softmax models would ignore its settings.
    return ["model.layers=softmax", "model.sse={}", f"model.softmax.num_heads={sse.num_heads}"]


def _plain(layers: str) -> Callable[[SSEConfig], list[str]]:
    """Return the settings of a single state of the same heads."""
    return lambda sse: [f"model.layers={layers}", f"model.sse={{num_heads: {sse.num_heads}, head_dim: {sse.head_dim}}}"]


def _large(sse: SSEConfig) -> list[str]:
    """Return a single state with as many elements as 16 partitions and the shared bank have.

    With an output gate, or with more heads, it would have more parameters than BASE. Raises UserError.
    """
    if sse.num_heads % 3 or sse.head_dim % 2:
        raise UserError("--arms: gla_large needs a multiple of 3 heads with an even number of channels; leave it out")
    heads = f"num_heads: {sse.num_heads // 3}, head_dim: {17 * sse.head_dim // 2}, value_head_dim: {6 * sse.head_dim}"
    return ["model.layers=gla", f"model.sse={{{heads}, output_gate: false}}"]


def _hybrid(sse: SSEConfig) -> list[str]:
    return ["model.layers=5*sse, softmax", f"model.softmax.num_heads={sse.num_heads}"]


ARMS = {
    "softmax": Arm("softmax", _softmax),
    "gla": Arm("GLA", _plain("gla")),
    "gdn": Arm("GDN", _plain("gdn")),
    "kda": Arm("KDA", _plain("kda")),
    "gla_large": Arm("GLA, state of 16 partitions", _large),
    BASE: Arm("SSE, 4 partitions", lambda sse: []),
    "n16k1": Arm("SSE, 16 partitions", lambda sse: ["model.sse.num_partitions=16"]),
    "hybrid": Arm("SSE-H, 4 partitions", _hybrid),
}


def arm_settings(name: str, path: Path, settings: list[str]) -> list[str]:
    """Return the settings of an arm: those for all arms, its own, and the width of the MLP that matches parameters.

    Raises UserError where the file's model is not one of 4 partitions, or the arm cannot have as many parameters.
    """
    base = load_config(path, settings).model
    if "sse" not in base.layer_kinds() or base.sse.num_partitions != 4:
        raise UserError(f"--config: {path} has to have model.layers: sse with model.sse.num_partitions: 4")
    given, wanted = [*settings, *ARMS[name].overrides(base.sse)], num_parameters(base)
    return check_parameters(name, path, given if name == BASE else match_parameters(path, given, wanted), wanted)
