"""A killed build resumes and makes the same files as an uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.data.builder import command, workers
from megatron_sse.errors import UserError
from tests.data.builder.killed import POINTS, WITHIN
from tests.data.builder.support import TEXTS, documents, files, records, run, write_lines

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_each_point_in_turn(tmp_path: Path, count: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", records([text * 3 for text in TEXTS] * 12))
    for point in (*((WITHIN,) if count == 1 else ()), *POINTS, "never"):
        call = [sys.executable, "-m", "tests.data.builder.killed", point, str(count), str(tmp_path / "out"), str(path)]
        process = subprocess.run(call, cwd=ROOT, start_new_session=True, capture_output=True, text=True)
        assert process.returncode == (0 if point == "never" else -signal.SIGKILL), process.stderr
        # The index appears last, once everything else is complete.
        assert (tmp_path / "out.idx").exists() == (point in ("idx named", "half removed", "never"))
    assert f"{len(TEXTS) * 12} documents" in process.stdout and "length in tokens" in process.stdout
    run(tmp_path / "whole", path, unit_bytes=2048)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob("*.building"))


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a JSONL file of which a build to `out` has processed one half."""
    path = write_lines(tmp_path / "a.jsonl", records())

    def interrupted(*arguments: Any) -> Any:
        for number in workers.build_parts(*arguments):
            if number == 3:
                raise KeyboardInterrupt
            yield number

    with monkeypatch.context() as patch:
        patch.setattr(command, "build_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", path)
    assert not (tmp_path / "out.idx").exists()
    return path


def test_after_an_interrupt_only_the_rest_is_read(
    half: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def noted(building: Path, job: Any, todo: Any, *rest: Any) -> Any:
        read.extend(number for number, _ in todo)
        return workers.build_parts(building, job, todo, *rest)

    monkeypatch.setattr(command, "build_parts", noted)
    caplog.set_level("INFO")
    run(half.parent / "out", half)
    assert read[0] == 4 and f"resuming: 4 of {4 + len(read)} parts are done" in caplog.text


def test_other_inputs_and_options_are_refused(half: Path) -> None:
    out = half.parent / "out"
    for options, name in (
        ({"field": "id"}, "field"),
        ({"unit_bytes": 65}, "unit_bytes"),
        ({"format": "chat"}, "format"),
    ):
        with pytest.raises(UserError, match=rf"^--output: .*out\.building holds a build .*: {name} differs; give"):
            run(out, half, **options)
    other = write_lines(half.parent / "b.jsonl", records())
    with pytest.raises(UserError, match=rf"{other} differs"):
        run(out, half, other)
    half.write_bytes(half.read_bytes() + b"\n")
    with pytest.raises(UserError, match=rf"{half} differs; give the same, or delete .*out\.building to start over"):
        run(out, half)


def test_an_input_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", records())

    def changing(*arguments: Any) -> Any:
        yield from workers.build_parts(*arguments)
        os.utime(path, ns=(0, 0))

    monkeypatch.setattr(command, "build_parts", changing)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read; delete .*out\.building and start"):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out.idx").exists()


def test_skipped_input_is_refused_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": ""}, b"{", *records()])
    with monkeypatch.context() as patch:
        patch.setattr(command, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", path, wrong="skip")
    with pytest.raises(UserError, match=r"got refuse, but this build started with skip and has skipped .*JSON"):
        run(tmp_path / "out", path)


def test_one_build_at_a_time(half: Path) -> None:
    with command.Workspace(half.parent / "other", {}):
        with pytest.raises(UserError, match=r"--output: another build is writing .*other;"):
            run(half.parent / "other", half)


def test_workers_that_fail_and_that_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*records(), b"{"])
    with pytest.raises(UserError, match=r"a\.jsonl:7: broken JSON"):
        run(tmp_path / "out", path, workers=2)
    monkeypatch.setattr(
        workers._Worker, "start_next", lambda worker, _: worker.process.kill() or vars(worker).update(is_busy=True)
    )
    with pytest.raises(UserError, match=r"a worker ended with status -9 \(killed: perhaps memory ran out\); run the"):
        run(tmp_path / "out2", path, workers=2)


@pytest.mark.parametrize("function", ["parts.fsync", "join.copy_into"])
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "tokens")

    path = write_lines(tmp_path / "a.jsonl", records())
    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_sse.data.builder.{function}", full)
        with pytest.raises(UserError, match=r"^tokens: No space left on device; fix this and run the same command"):
            run(tmp_path / "out", path)
    assert not (tmp_path / "out.bin").exists()
    run(tmp_path / "out", path)
    assert len(documents(tmp_path / "out")) == len(TEXTS)
