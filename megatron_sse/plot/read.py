"""Reading run folders: the scalars of their TensorBoard events, and their settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from megatron_sse.errors import UserError
from megatron_sse.reading import read_yaml
from megatron_sse.run_folder import CONFIG, EVENTS, TENSORBOARD

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


@dataclass(frozen=True)
class _EventFile:
    """An event file's scalars. time: when it was begun. start, last: its first and last step."""

    name: str
    time: float
    start: int
    last: int
    scalars: dict[str, Curve]


def _read_file(path: Path) -> _EventFile | None:
    """Read an event file as far as it is intact; None where it has no scalars."""
    scalars: dict[str, Curve] = {}
    time, starts = 0.0, []
    for event in LegacyEventFileLoader(str(path)).Load():
        time = time or event.wall_time
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    steps = [step for curve in scalars.values() for step, _ in curve]
    return _EventFile(path.name, time, min(starts + steps), max(steps), scalars) if steps else None


def _in_order(files: list[_EventFile]) -> Iterator[_EventFile]:
    """Yield event files in the order in which they were written.

    It is that of their times, but a file whose steps continue others' comes after these, since the clock may have been
    set back in between.
    """
    waiting = sorted(files, key=lambda file: (file.time, file.name))
    reached = 0
    while waiting:
        continued = (file for file in waiting if file.start <= reached + 1)
        file = next(continued, None) or min(waiting, key=lambda file: file.start)
        waiting.remove(file)
        reached = max(reached, file.last)
        yield file


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Read the scalars of all event files of a run. Raises UserError where there are none.

    A resumed run's file begins with the step after its checkpoint. Values of that and later steps in earlier files are
    dropped, since these steps were repeated.
    """
    # A file that was cut off is read as far as possible; tensorboard would warn about it.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    paths = sorted((folder / TENSORBOARD).glob(f"{EVENTS}.*"))
    for path in paths:
        if not path.is_file():
            # A named pipe would be waited for.
            logger.warning("%s: not a regular file, left out", path)
    files = [file for path in paths if path.is_file() and (file := _read_file(path)) is not None]
    scalars: dict[str, Curve] = {}
    for file in _in_order(files):
        for tag in scalars.keys() | file.scalars.keys():
            before = [(step, value) for step, value in scalars.get(tag, []) if step < file.start]
            scalars[tag] = before + sorted(dict(file.scalars.get(tag, [])).items())
    scalars = {tag: curve for tag, curve in scalars.items() if curve}
    if not scalars:
        raise UserError(f"{folder / TENSORBOARD}: no TensorBoard events; runs with monitor.tensorboard true write them")
    return scalars
