"""Memory snapshots with stand-ins for torch.cuda's functions, and the error of a run that is out of memory."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_sse.config import RunConfig
from megatron_sse.monitor.memory import MemoryWindow, advise, is_out_of_memory, report_out_of_memory
from tests.data.files import run_config
from tests.rl.support import policy_config
from tests.training.support import small_run
from tests.workers import run_workers


def record(folder: Path, first: int, last: int, start: int, end: int) -> list[str]:
    """Return the calls to torch, in steps `start` to `end`, of a window from `first` to `last`."""
    calls: list[str] = []

    def switch(enabled: str | None = "all", max_entries: int = 0) -> None:
        calls.append("off" if enabled is None else "on" if max_entries else "on without a bound")

    def dump(path: str) -> None:
        Path(path).touch()
        calls.append(f"wrote {Path(path).name}")

    with mock.patch("torch.cuda.memory._record_memory_history", switch):
        with mock.patch("torch.cuda.memory._dump_snapshot", dump):
            window = MemoryWindow([first, last], folder)
            for step in range(start, end + 1):
                window.before(step)
                calls.append(f"step {step}")
                window.after(step)
            window.close()
    return calls


def test_the_window_is_recorded_and_written_once(tmp_path: Path) -> None:
    name = "wrote memory_rank0_steps_2-3.pickle"
    [calls] = run_workers(1, record, tmp_path, 2, 3, 1, 4)
    assert calls == ["step 1", "on", "step 2", "step 3", name, "off", "step 4"]
    [calls] = run_workers(1, record, tmp_path, 2, 9, 3, 4)
    assert calls == ["on", "step 3", "step 4", "wrote memory_rank0_steps_2-9.pickle", "off"]
    [calls] = run_workers(1, record, tmp_path, 2, 3, 4, 4)
    assert calls == ["step 4"]


def test_a_full_disk_is_distinguished_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def config_of(tmp_path: Path, **training: object) -> RunConfig:
    return run_config(str(tmp_path / "train"), training={"global_batch_size": 8, **training})


def test_advice_names_what_this_run_can_change(tmp_path: Path) -> None:
    text = advise(config_of(tmp_path, micro_batch_size=4))
    assert text.startswith("to save memory: training.micro_batch_size=2, training.recompute=full, parallel.context=2,")
    assert "rl.answers_at_once=128, " in advise(policy_config(tmp_path / "rl"))
    assert "rl." not in advise(policy_config(tmp_path / "rl", rl={"answers_at_once": 4}))
    text = advise(config_of(tmp_path, micro_batch_size=1, recompute="full"))
    assert text.startswith("to save memory: parallel.context=2, ")


def report(folder: Path) -> list[str]:
    with mock.patch("torch.cuda.memory._dump_snapshot", lambda path: Path(path).touch()):
        report_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), config_of(folder))
        report_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"), config_of(folder))
    return sorted(path.name for path in (folder / "train_run").iterdir())


def test_a_gpu_without_room_leaves_a_snapshot(tmp_path: Path) -> None:
    assert run_workers(1, report, tmp_path) == [["memory_rank0_out_of_memory.pickle"]]


def test_a_run_without_room_says_what_to_change(tmp_path: Path) -> None:
    # This embedding exceeds any address space, so that its allocation fails.
    config = small_run(tmp_path, model={"vocab_size": 1 << 24, "hidden_size": 1 << 24, "ffn_hidden_size": 64})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "megatron_sse", "train", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 1, run.stderr
    assert "rank 0: out of memory; to save memory: training.recompute=full, parallel.context=2, " in run.stdout
