"""The arms of the study of language modelling: settings on top of configs/language_study.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sse.config import load_config
from megatron_sse.errors import UserError
from megatron_sse.tools.studies.sizes import match_parameters, num_parameters

BASE = "n4k1"
# Each arm is trained with these, one seed each; the best of them gets more seeds.
LEARNING_RATES = (4e-3, 1.2e-2)


@dataclass(frozen=True)
class Arm:
    """A model of the study, with as many parameters as BASE through the width of its MLP.

    label: its name in tables and pictures. overrides: settings on top of the file's.
    """

    label: str
    overrides: tuple[str, ...]


# model.sse is empty because softmax models would ignore its settings.
ARMS = {
    "softmax": Arm("softmax", ("model.layers=softmax", "model.sse={}", "model.softmax.num_heads=3")),
    "gla": Arm("GLA", ("model.layers=gla", "model.sse={num_heads: 3, head_dim: 32}")),
    "gdn": Arm("GDN", ("model.layers=gdn", "model.sse={num_heads: 3, head_dim: 32}")),
    "kda": Arm("KDA", ("model.layers=kda", "model.sse={num_heads: 3, head_dim: 32}")),
    # As many state elements as n16k1. With an output gate, or with more heads, it would have more parameters than BASE.
    "gla_large": Arm(
        "GLA, state of 16 partitions",
        ("model.layers=gla", "model.sse={num_heads: 1, head_dim: 272, value_head_dim: 192, output_gate: false}"),
    ),
    BASE: Arm("SSE, 4 partitions", ()),
    "n16k1": Arm("SSE, 16 partitions", ("model.sse.num_partitions=16",)),
    "hybrid": Arm("SSE-H, 4 partitions", ("model.layers=5*sse, softmax", "model.softmax.num_heads=3")),
}


def find_arms(names: str | None) -> list[str]:
    """Return the arms named in a string with commas, or all arms for None. Raises UserError."""
    found = list(ARMS) if names is None else [name.strip() for name in names.split(",")]
    for name in found:
        if name not in ARMS or found.count(name) > 1:
            raise UserError(f"--arms: got {name!r}, allowed {', '.join(ARMS)}, each once")
    return found


def arm_settings(name: str, path: Path, settings: list[str]) -> list[str]:
    """Return the settings of an arm: those for all arms, its own, and the width of the MLP that matches parameters."""
    wanted = num_parameters(load_config(path, [*settings, *ARMS[BASE].overrides]).model)
    given = [*settings, *ARMS[name].overrides]
    return given if name == BASE else match_parameters(path, given, wanted)
