"""Profiler windows on CPU ranks: their steps and ranks, and the trace of a window that a run does not finish."""

import gzip
import json
import os
from pathlib import Path

import torch

from megatron_sse.monitor.profile import ProfileWindow
from tests.workers import run_workers


def take_steps(folder: Path, first: int, last: int, start: int, end: int) -> None:
    """Run steps `start` to `end`, step n with n products, and a window from `first` to `last`."""
    window = ProfileWindow([first, last], folder, on_gpu=False)
    square = torch.ones(8, 8)
    for step in range(start, end + 1):
        window.before(step)
        for _ in range(step):
            torch.mm(square, square)
        window.after(step)
    window.close()


def read_traces(folder: Path) -> list[int]:
    """Return the number of products in each trace."""
    counts = []
    for path in sorted((folder / "tensorboard/profile").glob("rank0_steps_*.pt.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        counts.append(sum(event.get("name") == "aten::mm" for event in events))
    return counts


def test_the_steps_of_the_window_and_no_others(tmp_path: Path) -> None:
    run_workers(1, take_steps, tmp_path, 3, 4, 1, 6)
    assert read_traces(tmp_path) == [3 + 4]
    table = (tmp_path / "profile_rank0_steps_3-4.txt").read_text()
    row = next(line for line in table.splitlines() if "aten::mm" in line)
    assert row.split()[-1] == "7"


def test_a_window_from_the_first_step(tmp_path: Path) -> None:
    run_workers(1, take_steps, tmp_path, 1, 1, 1, 2)
    assert read_traces(tmp_path) == [1]


def test_a_run_that_resumes_or_ends_inside_of_the_window(tmp_path: Path) -> None:
    run_workers(1, take_steps, tmp_path, 2, 9, 4, 5)
    assert read_traces(tmp_path) == [4 + 5]


def test_a_run_outside_of_the_window_leaves_nothing(tmp_path: Path) -> None:
    run_workers(1, take_steps, tmp_path, 2, 3, 4, 5)
    run_workers(1, take_steps, tmp_path, 6, 7, 4, 5)
    assert os.listdir(tmp_path) == []
