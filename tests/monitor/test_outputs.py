"""What only watches a run: where it cannot be written, the run goes on, says so once, and tries again."""

import contextlib
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.checkpoint.folders import find_all_damage
from megatron_sse.config import load_config
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.plot.read import read_scalars
from megatron_sse.training.loop import Run, Signals
from tests.checkpoint.processes import Processes
from tests.monitor.events import read_events
from tests.training.support import small_run, start
from tests.workers import run_workers

Act = Callable[[Path], None]
SECTIONS: dict[str, dict[str, Any]] = {"checkpoint": {"interval": 2}, "monitor": {"health_interval": 2}}


def move(run: Path) -> None:
    run.rename(run.with_name("moved"))


def delete(run: Path) -> None:
    shutil.rmtree(run)


def block_events(run: Path) -> None:
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").touch()


def unblock_events(run: Path) -> None:
    (run / "tensorboard").unlink()


def block_settings(run: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "config.yaml/something").mkdir(parents=True)


def block_profile(run: Path) -> None:
    (run / "tensorboard/profile").touch()


def faulty_run(folder: Path, acts: Mapping[int, Act], sections: dict[str, Any]) -> list[str]:
    """Train to the end, with acts on the run folder before some steps; return the warnings and errors."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_sse").addHandler(handler)
    run: Run = start(small_run(folder, **(SECTIONS | sections)))
    take_step = run.trainer.train_step

    def train_step(batches: Any) -> Any:
        acts.get(run.consumed_samples // 4 + 1, lambda folder: None)(folder / "run")
        return take_step(batches)

    run.trainer.train_step = train_step  # type: ignore[method-assign]
    run.run(Signals())
    logging.getLogger("megatron_sse").removeHandler(handler)
    return lines


def warnings_of(folder: Path, acts: Mapping[int, Act], **sections: Any) -> list[str]:
    """Return what a faulty run warns of; check that it saved its last step."""
    small_run(folder)
    [lines] = run_workers(1, faulty_run, folder, acts, sections)
    assert find_all_damage(folder / "run/checkpoints/iter_0000008", hashes=True) == []
    return lines


def steps_of_events(run: Path) -> list[int]:
    return [step for step, _ in read_scalars(run)["train/loss"]]


@pytest.mark.parametrize("act", [move, delete])
def test_a_folder_that_is_gone_is_made_again(act: Act, tmp_path: Path) -> None:
    assert warnings_of(tmp_path, {4: act}) == []
    # It holds all that resuming and plot need.
    assert steps_of_events(tmp_path / "run") == [4, 5, 6, 7, 8]
    assert load_config(tmp_path / "run/config.yaml").training.steps == 8
    if act is move:
        assert steps_of_events(tmp_path / "moved") == [1, 2, 3]
        assert find_all_damage(tmp_path / "moved/checkpoints/iter_0000002", hashes=True) == []


def test_events_are_tried_again(tmp_path: Path) -> None:
    first, second = warnings_of(tmp_path, {3: block_events, 6: unblock_events})
    assert first == f"TensorBoard events not written: {tmp_path}/run/tensorboard: File exists"
    assert second == "TensorBoard events: written again"
    assert steps_of_events(tmp_path / "run") == [6, 7, 8]


def test_settings_that_cannot_be_written(tmp_path: Path) -> None:
    [line] = warnings_of(tmp_path, {3: block_settings})
    assert re.match(f"config.yaml not written: {tmp_path}/run/config.yaml.*: Is a directory", line)


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    [line] = warnings_of(tmp_path, {4: block_profile}, monitor={"profile_steps": [4, 5]})
    assert line.startswith("profile not written: ")


def run_until(folder: Path, clock: float, stop: int | None) -> None:
    """Train with a clock set to `clock`; without saving on the way after step 3, and not at all after step `stop`."""
    first = folder / "run/checkpoints/iter_0000003"
    run: Run = start(small_run(folder, checkpoint={"interval": 3}), first if first.exists() else None)
    take_step, real = run.trainer.train_step, time.time

    def train_step(batches: Any) -> Any:
        if stop is not None and run.consumed_samples == 4 * stop:
            raise KeyboardInterrupt
        return take_step(batches)

    run.trainer.train_step = train_step  # type: ignore[method-assign]
    time.time = lambda: clock
    try:
        with contextlib.suppress(KeyboardInterrupt):
            run.run(Signals())
    finally:
        time.time = real
        destroy_groups()


@pytest.mark.parametrize("later", [2_000_000_000.0, 1_000_000_000.0])
def test_a_resumed_run_continues_the_curves(later: float, tmp_path: Path) -> None:
    """TensorBoard shows each step once after a crash and a resume, also where the clock was set back in between."""
    small_run(tmp_path)
    for clock, stop in ((1_500_000_000.0, 5), (later, None)):
        run_workers(1, run_until, tmp_path, clock, stop)
    expected = [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in read_events(tmp_path / "run")["train/loss"]] == expected
    assert steps_of_events(tmp_path / "run") == expected
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == expected
    assert all({"train/loss", "optimizer/learning_rate"} <= set(line) for line in lines)


def write_run(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(small_run(folder, **(SECTIONS | sections)).to_yaml())
    return path


def test_logs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").touch()
    codes, output = Processes(write_run(tmp_path), None, world_size=1).start().end()
    assert codes == [0] and "step 8/8" in output and "Traceback" not in output, output
    assert output.count("not written") == 1 and f"{tmp_path}/run/logs/rank_00000.log not written" in output


def test_a_console_on_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_sse", "train", str(write_run(tmp_path))]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "step 8/8" in (tmp_path / "run/logs/rank_00000.log").read_text()
