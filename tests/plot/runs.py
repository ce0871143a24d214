"""Run folders that look like those of real runs."""

import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tests.data.files import run_config

PARTITIONS = 4


def write_run(folder: Path, steps: int = 60, processes: int = 1, **sections: dict[str, Any]) -> Path:
    """Write a run folder with settings and events of `steps` steps; layers sse, softmax, sse, softmax."""
    model = {"num_layers": 4, "layers": "sse, softmax", **sections.pop("model", {})}
    config = run_config(str(folder / "train"), model=model, monitor={"folder": str(folder)}, **sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    values = {step: step_values(step, steps, processes) for step in range(1, steps + 1)}
    for step in range(10, steps + 1, 10):
        values[step] |= health_values(step, config.model.sse.num_partitions)
    values[steps]["validation/loss"] = 2.1
    write_events(folder, values)
    return folder


def write_events(folder: Path, values: dict[int, dict[str, float]]) -> None:
    """Write one more event file to a run folder, with the scalars of some steps."""
    number = len(list(folder.glob("tensorboard/*")))
    # Event files are named after the second of their creation.
    writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{number}")
    for step, scalars in values.items():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
    writer.close()


def step_values(step: int, steps: int, processes: int) -> dict[str, float]:
    return {
        "train/loss": 2 + 4 * math.exp(-step / 20) + 0.1 * math.sin(7 * step),
        "train/spikes": 0,
        "optimizer/learning_rate": 1e-3 * (1 - step / steps),
        "optimizer/grad_norm": 0.5 + 1 / step,
        "speed/tokens_per_second": 10_000.0 * processes,
        "speed/processes": processes,
        "memory/peak_gib": 1.5,
    }


def health_values(step: int, num_partitions: int) -> dict[str, float]:
    values: dict[str, float] = {}
    for layer in (1, 3):
        values[f"sse/layer_{layer:02d}/router_entropy"] = 0.5 / layer
        for partition in range(1, num_partitions + 1):
            values[f"sse/layer_{layer:02d}/share_{partition}"] = 2 * partition / (num_partitions * (num_partitions + 1))
    return values
