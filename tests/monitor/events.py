"""What a run wrote for TensorBoard."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by scalar name."""
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
