"""metrics.jsonl: a line for each step, never two, and never a part of one."""

import json
import math
import os
import resource
from pathlib import Path

import pytest

from megatron_sse.monitor.metrics import Metrics


def read(path: Path) -> list[dict[str, float | None]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    return lines


def test_what_a_step_reports_later_joins_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path, 1)
    metrics.write(1, {"train/loss": 2.0})
    metrics.write(2, {"train/loss": math.inf})
    metrics.write(2, {"validation/loss": 1.5})
    metrics.write(3, {"train/loss": 1.0})
    two = {"step": 2, "train/loss": None, "validation/loss": 1.5}
    assert read(path) == [{"step": 1, "train/loss": 2.0}, two, {"step": 3, "train/loss": 1.0}]


@pytest.mark.parametrize("rest", [b'{"step": 4, "time": 2e9, "tr', b"", b"\xff\n", b'{"step": 3, "time": 2e9}\n'])
def test_a_resumed_run_drops_the_steps_that_it_repeats(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 1)
    for step in (1, 2, 3):
        first.write(step, {"a": step})
    with path.open("ab") as file:
        file.write(rest)
    second = Metrics(path, 3)
    assert path.read_bytes().endswith(rest)
    for step in (3, 4):
        second.write(step, {"a": 10 * step})
    assert [(line["step"], line["a"]) for line in read(path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_a_file_that_is_gone_or_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 1)
    metrics.write(1, {"a": 1})
    metrics.write(2, {"a": 2})
    path.unlink()
    metrics.write(2, {"b": 3})
    metrics.write(3, {"a": 4})
    assert [line["step"] for line in read(path)] == [2, 3] and read(path)[0] == {"step": 2, "a": 2, "b": 3}


def test_a_pipe_without_a_reader_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No such device or address"):
        Metrics(tmp_path / "metrics.jsonl", 1).write(1, {"a": 1})


def test_a_part_of_a_line_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 1)
    metrics.write(1, {"a": 1})
    # On a disk that is nearly full, a write takes fewer bytes than it was given.
    monkeypatch.setattr(json, "dumps", lambda line: "x" * 100)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limit[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            metrics.write(2, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.undo()
    metrics.write(3, {"a": 3})
    assert [line["step"] for line in read(path)] == [1, 3]
