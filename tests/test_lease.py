"""Leases: one holder at a time, taken over from a holder that has ended or stands still."""

import os
import re
import select
import signal
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_sse import lease
from megatron_sse.errors import UserError
from megatron_sse.lease import Holder, Lease, LeaseLostError, hold, refuse_if_held_here
from megatron_sse.reading import read_json
from tests.leases import elsewhere
from tests.workers import fork_context

KEY = "monitor.folder"


def hold_until_told(name: Path, pipe: Connection) -> None:
    """Hold a lease until a message comes; say when it is held, or why not."""
    try:
        with hold(name.parent, KEY, name.name):
            pipe.send("held")
            pipe.recv()
    except UserError as error:
        pipe.send(str(error))


def start_holder(name: Path) -> tuple[int, Connection]:
    context = fork_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_until_told, args=(name, theirs), daemon=True)
    process.start()
    assert process.pid is not None
    return process.pid, ours


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_process_holds_a_lease(tmp_path: Path) -> None:
    name = tmp_path / "run/training"
    pid, pipe = start_holder(name)
    assert pipe.recv() == "held"
    message = rf"monitor.folder: got {name.parent}, which process {pid} on \S+ \(since .*\) is writing to; wait, .*"
    for refused in (
        lambda: refuse_if_held_here(name.parent, KEY, name.name),
        lambda: hold(name.parent, KEY, name.name).__enter__(),
    ):
        with pytest.raises(UserError) as raised:
            refused()
        assert re.fullmatch(message, str(raised.value)), raised.value
    assert files(name.parent) == ["training.lease_1"]
    # Another name in the same folder is another lease.
    with hold(tmp_path / "run", KEY, "other"):
        pass
    pipe.send("end")
    pid, pipe = start_holder(name)
    # The first may not have given it back yet.
    while (answer := pipe.recv()) != "held":
        assert "which process" in answer
        pid, pipe = start_holder(name)
    pipe.send("end")


def test_the_lease_of_a_killed_holder_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", 1e9)
    name = tmp_path / "training"
    pid, pipe = start_holder(name)
    assert pipe.recv() == "held"
    ended = os.pidfd_open(pid)
    # It is not waited for, so that it stays a zombie.
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        pipe.recv()
    # Its pipe is closed a moment before it has ended.
    select.select([ended], [], [])
    os.close(ended)
    refuse_if_held_here(name.parent, KEY, name.name)
    with hold(name.parent, KEY, name.name) as held:
        assert files(tmp_path) == ["training.lease_2"]
        held.check()
    assert files(tmp_path) == []


def test_the_number_of_a_process_may_be_used_again(tmp_path: Path) -> None:
    me = Holder.of_this_process()
    assert me.is_alive() is True
    assert replace(me, ticks=me.ticks - 1).is_alive() is False
    assert replace(me, boot="another").is_alive() is None
    assert replace(me, namespace="pid:[1]").is_alive() is None


@pytest.mark.parametrize("content", ["", "[1]", "{}", None], ids=str)
def test_a_holder_elsewhere_that_stands_still_loses_its_lease(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its file cannot be read: it may just have been created."""
    monkeypatch.setattr(lease, "STALE_AFTER", 0.3)
    name = tmp_path / "training"
    file = elsewhere(name)
    if content is not None:
        file.write_text(content)
    with hold(name.parent, KEY, name.name):
        assert files(tmp_path) == ["training.lease_5"]


def test_a_lease_of_long_ago_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", 1e9)
    file = elsewhere(tmp_path / "training")
    before = file.stat().st_mtime - 2 * lease._LONG_AGO
    os.utime(file, (before, before))
    with hold(tmp_path, KEY, "training"):
        assert files(tmp_path) == ["training.lease_5"]


def test_a_holder_elsewhere_that_renews_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", 120.0)
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.01)
    file = elsewhere(tmp_path / "training")
    other = Lease(tmp_path, tmp_path / "training", file, read_json(file, Holder), lambda error: None)
    with pytest.raises(UserError, match="which process 12 on node7 .since .* is writing to"):
        hold(tmp_path, KEY, "training").__enter__()
    assert files(tmp_path) == ["training.lease_4"]
    other.release()


def test_a_holder_notices_that_it_lost_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.01)
    said: list[LeaseLostError] = []
    noticed = threading.Event()
    with hold(tmp_path, KEY, "training", lambda error: (said.append(error), noticed.set())) as held:
        # A file that was deleted by somebody is written again.
        (tmp_path / "training.lease_1").unlink()
        while "training.lease_1" not in files(tmp_path):
            pass
        held.check()
        elsewhere(tmp_path / "training")
        assert noticed.wait(60)
        with pytest.raises(LeaseLostError, match="was taken over by process 12 on node7"):
            held.check()
    assert len(said) == 1 and files(tmp_path) == ["training.lease_4"]


def test_the_lease_of_a_folder_that_was_moved_has_one_holder(tmp_path: Path) -> None:
    name = tmp_path / "run/training"
    with hold(name.parent, KEY, name.name) as first:
        name.parent.rename(tmp_path / "moved")
        first.check()
        _, pipe = start_holder(name)
        assert pipe.recv() == "held"
        with pytest.raises(LeaseLostError, match=r"run was taken over by process \d+ on .*"):
            first.check()
    # Not deleted by the first.
    assert files(name.parent) == ["training.lease_1"]
    pipe.send("end")


def test_of_two_that_come_at_once_at_most_one_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process creates its file between the look at the files and the creation of the own one."""
    name, write = tmp_path / "training", lease._write
    for theirs in ("training.lease_1", "training.lease_2"):

        def write_second(file: Path, holder: Holder, theirs: str = theirs) -> None:
            (tmp_path / theirs).write_text("{}")
            write(file, holder)

        monkeypatch.setattr(lease, "_write", write_second)
        with pytest.raises(UserError, match="which another process is writing to"):
            hold(name.parent, KEY, name.name).__enter__()
        assert files(tmp_path) == [theirs]
        (tmp_path / theirs).unlink()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^monitor.folder: got /proc/runs, allowed a folder that can be written to"):
        hold(Path("/proc/runs"), KEY, "training").__enter__()
