"""A run that is killed while it generates or trains: the same command goes on as if it had not been."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.checkpoint.manifest import read_manifest
from megatron_sse.rl import rollouts
from megatron_sse.training.step import Trainer
from tests.checkpoint.processes import _free_port, run_rank
from tests.rl.support import policy_config
from tests.rl.test_run import scalars
from tests.workers import fork_context


def die_at(call: int, function: Any) -> Any:
    """Return the function; its `call`-th call kills the process."""
    calls = 0

    def count(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return count


def run_once(config: str, point: str | None, log: str) -> None:
    """Run the only process of a run; kill it in the third step, while generating or training."""
    if point == "generating":
        # Answers of at most 8 tokens: 7 calls in a step.
        rollouts.feed = die_at(7 + 7 + 4, rollouts.feed)
    if point == "training":
        Trainer.train_step = die_at(3, Trainer.train_step)  # type: ignore[method-assign]
    run_rank(0, 1, _free_port(), config, None, log)


def run(folder: Path, point: str | None = None) -> int | None:
    config = policy_config(
        folder,
        training={"steps": 4, "micro_batch_size": 2, "precision": "fp32"},
        checkpoint={"interval": 2, "asynchronous": False},
    )
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    process = fork_context().Process(target=run_once, args=(str(path), point, str(folder / "run.log")))
    process.start()
    process.join(120)
    return process.exitcode


def result(folder: Path) -> tuple[dict[str, str], dict[int, dict[str, float]]]:
    """Return the hashes of the last checkpoint's tensors, and what was reported."""
    files = read_manifest(folder / "run/checkpoints/iter_0000004").files
    return {name: file.sha256 for name, file in files.items() if name.endswith(".distcp")}, scalars(folder)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder) == 0, (folder / "run.log").read_text()
    expected = result(folder)
    assert set(expected[1]) == {1, 2, 3, 4} and len(expected[0]) == 1
    for point in ("generating", "training"):
        shutil.rmtree(folder / "run")
        assert run(folder, point) == -signal.SIGKILL
        assert [path.name for path in (folder / "run/checkpoints").glob("iter_*")] == ["iter_0000002"]
        assert run(folder) == 0 and result(folder) == expected
