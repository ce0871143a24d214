"""Whole runs: SIGTERM saves and exits 0, the next run goes on, SIGINT exits 130, settings of the end are kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.training.loop import Run, Signals
from tests.training.support import small_run, start
from tests.workers import run_workers

PROGRAM = """
import logging, sys
from megatron_sse.config import load_config
from megatron_sse.training import train
logging.basicConfig(level=logging.WARNING)
logging.getLogger("megatron_sse").setLevel(logging.INFO)
sys.exit(train(load_config(sys.argv[1], [])))
"""


def launch(config_file: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", PROGRAM, str(config_file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def run_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines of the log up to the first that holds `text`."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in the log:\n{''.join(lines)}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, rest = process.communicate(timeout=120)
    return process.returncode, rest


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(small_run(folder, **sections).to_yaml())
    return path


def test_sigterm_saves_and_exits_0_and_the_next_run_goes_on(tmp_path: Path) -> None:
    endless = write_config(tmp_path, training={"steps": 100_000, "global_batch_size": 4, "precision": "fp32"})
    process = launch(endless)
    run_until(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    code, log = finish(process)
    assert code == 0, log
    checkpoint = (tmp_path / "run/checkpoints/latest").read_text().strip()
    steps = int(checkpoint.removeprefix("iter_"))
    assert steps >= 3
    total = {"steps": steps + 2, "global_batch_size": 4, "precision": "fp32"}
    process = launch(write_config(tmp_path, training=total))
    code, log = finish(process)
    assert code == 0, log
    assert f"{steps} steps done" in log and f"step {steps + 1}/" in log and f"step {steps}/" not in log
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == f"iter_{steps + 2:07d}"
    unexpected = [line for line in log.splitlines() if not line.startswith("INFO:megatron_sse.")]
    assert unexpected == []


def test_sigint_exits_130_and_saves_nothing(tmp_path: Path) -> None:
    process = launch(write_config(tmp_path, training={"steps": 100_000, "global_batch_size": 4, "precision": "fp32"}))
    run_until(process, "step 2/")
    process.send_signal(signal.SIGINT)
    code, log = finish(process)
    assert code == 130
    assert "interrupted" in log and "Traceback" not in log
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def terminated_on_one_rank(folder: Path) -> list[str]:
    """Rank 1 alone gets SIGTERM during step 3; what the run leaves behind."""
    run = start(small_run(folder))
    take_step = run.trainer.train_step

    def step_with_signal(batches: Any) -> Any:
        result = take_step(batches)
        if os.environ["RANK"] == "1" and run.consumed_samples == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    run.trainer.train_step = step_with_signal  # type: ignore[method-assign]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run.run(Signals())
    signal.signal(signal.SIGTERM, handlers[0])
    signal.signal(signal.SIGINT, handlers[1])
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


def test_sigterm_on_one_rank_ends_all_after_the_same_step(tmp_path: Path) -> None:
    small_run(tmp_path)
    assert run_workers(2, terminated_on_one_rank, tmp_path) == [["iter_0000003", "latest"]] * 2


def validation_losses(folder: Path, sections: dict[str, Any]) -> list[tuple[int, float]]:
    run = start(small_run(folder, **sections))
    reported: list[tuple[int, float]] = []
    run.monitor.validation = lambda step, loss: reported.append((step, loss))  # type: ignore[method-assign]
    run.run(Signals())
    return reported


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=str)
def test_validation_comes_at_its_interval_and_at_the_end(tmp_path: Path, parallel: dict[str, Any]) -> None:
    train = str(tmp_path / "train")
    sections: dict[str, Any] = {
        "training": {
            "steps": 5,
            "global_batch_size": 4,
            "precision": "fp32",
            "validation_interval": 2,
            "validation_batches": 3,
        },
        "data": {"train": train, "validation": train, "sequence_length": 16},
        "checkpoint": {"resume": "none"},
    }
    small_run(tmp_path)
    [expected] = run_workers(1, validation_losses, tmp_path, sections)
    assert [step for step, _ in expected] == [2, 4, 5]
    assert expected[-1][1] < expected[0][1]
    for reported in run_workers(2, validation_losses, tmp_path, sections | {"parallel": parallel}):
        assert [step for step, _ in reported] == [2, 4, 5]
        assert [loss for _, loss in reported] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    small_run(tmp_path)
    assert run_workers(1, finish_twice, tmp_path) == [(3, 0)]


def finish_twice(folder: Path) -> tuple[int, int]:
    """Steps taken by a run of three steps, and by the same run started again."""
    taken = []
    for resume in (None, folder / "run/checkpoints/iter_0000003"):
        run: Run = start(small_run(folder, training={"steps": 3, "global_batch_size": 4, "precision": "fp32"}), resume)
        before = run.consumed_samples
        run.run(Signals())
        taken.append((run.consumed_samples - before) // 4)
        destroy_groups()
    return taken[0], taken[1]
