"""A run's TensorBoard events and its monitor's warnings."""

import logging
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sse.training.loop import Run, Signals


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values by scalar name."""
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def run_and_listen(run: Run) -> list[str]:
    """Train to the end and return the monitor's warnings."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_sse.monitor.monitor")
    logger.addHandler(handler)
    run.run(Signals())
    logger.removeHandler(handler)
    return lines
