"""The arms of the study of recall against state: settings on top of configs/recall_mqar.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sse.config import load_config
from megatron_sse.tools.studies.sizes import check_parameters, match_parameters, num_parameters

LEARNING_RATES = (3e-3, 1e-2)
# Tokens of a sequence are 2 for each pair and 1 for each question.
PAIRS = (16, 32, 48)
HEADS, HEAD_DIM = 2, 8
# State elements of a layer. Larger ones are not reached by heads or values with as many parameters.
STATES = (512, 2048)
# Keys and values of a head; value heads; partitions, each as large as the shared bank.
WAYS = {
    "heads": {512: "head_dim=16", 2048: "head_dim=32"},
    "values": {512: "num_value_heads=8", 2048: "num_value_heads=32"},
    "partitions": {512: "num_partitions=3", 2048: "num_partitions=15"},
}


@dataclass(frozen=True)
class Arm:
    """A cell of the plane. state: elements of a layer."""

    pairs: int
    state: int
    way: str

    @property
    def touched(self) -> int:
        """State elements of a layer that a token writes and reads: with partitions, those of two banks."""
        return 2 * HEADS * HEAD_DIM**2 if self.way == "partitions" else self.state

    def overrides(self) -> list[str]:
        """Return the settings on top of configs/recall_mqar.yaml."""
        task = [f"data.{part}.mqar.pairs={self.pairs}" for part in ("train", "validation")]
        partitions = [] if self.way == "partitions" else ["model.sse.num_partitions=0"]
        own = f"model.sse.{WAYS[self.way][self.state]}"
        return [*task, f"data.sequence_length={3 * self.pairs}", "optimizer.schedule=wsd", *partitions, own]


ARMS = {f"{way}_{state}_pairs_{pairs}": Arm(pairs, state, way) for pairs in PAIRS for state in STATES for way in WAYS}


def arm_settings(name: str, path: Path, settings: list[str]) -> list[str]:
    """Return the settings of an arm, with as many parameters as the file's model. Raises UserError."""
    wanted = num_parameters(load_config(path, settings).model)
    own = match_parameters(path, [*settings, *ARMS[name].overrides()], wanted)
    return check_parameters(name, path, own, wanted)
