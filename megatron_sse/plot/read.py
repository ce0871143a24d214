"""Reading run folders: the scalars of their TensorBoard events, and their settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from megatron_sse.errors import UserError
from megatron_sse.reading import read_yaml
from megatron_sse.run_folder import CONFIG, TENSORBOARD

logger = logging.getLogger(__name__)

# The settings that the plots need. A run writes all settings, with defaults filled in.
NEEDED = ["model.layers", "model.num_layers", "training.steps", "parallel.data"]
NEEDED += [f"parallel.{axis}" for axis in ("tensor", "pipeline", "virtual_pipeline", "context")]
_SHARE = re.compile(r"sse/layer_(\d+)/share_(\d+)")
_ENTROPY = re.compile(r"sse/layer_(\d+)/router_entropy")

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunLog:
    """The log of a run.

    name: shown in the plots. settings: by dotted key. scalars: steps and values by TensorBoard tag, in step order.
    """

    name: str
    settings: dict[str, Any]
    scalars: dict[str, Curve]

    def curve(self, tag: str) -> Curve:
        """Return the steps and values of a tag; an empty list where it was not written."""
        return self.scalars.get(tag, [])

    def last(self, tag: str) -> float | None:
        """Return the last value of a tag; None where it was not written."""
        return self.scalars[tag][-1][1] if tag in self.scalars else None

    def shares(self) -> dict[int, dict[int, Curve]]:
        """Return the share of the writes by layer and partition, both counted from 1."""
        found: dict[int, dict[int, Curve]] = {}
        matches = [match for tag in self.scalars if (match := _SHARE.fullmatch(tag))]
        for layer, partition, tag in sorted((int(match[1]), int(match[2]), match[0]) for match in matches):
            found.setdefault(layer, {})[partition] = self.scalars[tag]
        return found

    def entropies(self) -> dict[int, Curve]:
        """Return the entropy of the router in nats by layer, counted from 1."""
        matches = [match for tag in self.scalars if (match := _ENTROPY.fullmatch(tag))]
        return {layer: self.scalars[tag] for layer, tag in sorted((int(match[1]), match[0]) for match in matches)}


def read_runs(folders: Iterable[str]) -> list[RunLog]:
    """Read the runs in these folders, and name them so that they can be told apart. Raises UserError."""
    paths = [Path(folder) for folder in folders]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"{path}: given twice")
    return [
        RunLog(name, _read_settings(path), read_scalars(path)) for name, path in zip(_names(paths), paths, strict=True)
    ]


def _names(paths: list[Path]) -> list[str]:
    """Return the folders' names, with as many of their parents as are needed to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read_settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found")
    path = folder / CONFIG
    try:
        settings = flatten(read_yaml(path, dict[str, Any]))
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be read ({reason}); give a run folder") from None
    missing = [key for key in NEEDED if key not in settings]
    if missing:
        raise UserError(f"{path}: {missing[0]} missing; give a folder with the config.yaml that a run wrote")
    return settings


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _written(path: Path) -> list[tuple[int, str]]:
    """Return a sort key for event files: time, process and number in the process, which are all parts of the name."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.name.split(".")]


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Read the scalars of all event files of a run. Raises UserError where there are none.

    The first step in a resumed run's file is the one after its checkpoint. Values of that and later steps in earlier
    files are dropped, since these steps were repeated.
    """
    # A file that was cut off is read as far as possible; tensorboard would warn about it.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    scalars: dict[str, Curve] = {}
    for path in sorted((folder / TENSORBOARD).glob("events.out.tfevents.*"), key=_written):
        if not path.is_file():
            # A named pipe would be waited for.
            logger.warning("%s: not a regular file, left out", path)
            continue
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
        events.Reload()
        found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        if not found:
            continue
        start = min(step for curve in found.values() for step, _ in curve)
        for tag in scalars.keys() | found.keys():
            before = [(step, value) for step, value in scalars.get(tag, []) if step < start]
            scalars[tag] = before + sorted(dict(found.get(tag, [])).items())
    scalars = {tag: curve for tag, curve in scalars.items() if curve}
    if not scalars:
        raise UserError(f"{folder / TENSORBOARD}: no TensorBoard events; runs with monitor.tensorboard true write them")
    return scalars
