"""Two runs in one folder (F36): the second is refused, a killed one is replaced, one that lost it saves nothing."""

import os
import re
import signal
import socket
from pathlib import Path

import psutil
import pytest

from megatron_sse import cli
from tests.checkpoint.processes import STEP, Fault, Processes
from tests.checkpoint.test_processes import newest, write_run
from tests.leases import alive_here, elsewhere


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of the last change of all files and folders."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def stopped_run(config: Path) -> tuple[Processes, int]:
    """Start a run on one process, which is stopped in its third step, with a checkpoint after the second."""
    processes = Processes(config, Fault("stop", STEP, (0,)), world_size=1).start()
    process = processes.running[0]
    assert process.pid is not None
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        process.join(0.05)
        assert process.is_alive(), processes.log.read_text()
    return processes, process.pid


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, parallel={}, checkpoint={"interval": 2, "asynchronous": False})
    first, pid = stopped_run(config)
    (tmp_path / "second").mkdir()
    again = tmp_path / "second/run.yaml"
    again.write_text(config.read_text())
    try:
        before = contents(tmp_path / "run")
        codes, output = Processes(again, None, world_size=1).start().end()
        status = cli.main(["train", str(config)])
        after = contents(tmp_path / "run")
    finally:
        os.kill(pid, signal.SIGKILL)
        first.end()
    message = (
        rf"monitor.folder: got \S+, which process {pid} on {socket.gethostname()} \(since .*\) is writing to; .*\n"
    )
    assert codes == [2] and re.fullmatch(message, output), output
    assert status == 2 and re.fullmatch(message, capfd.readouterr().err)
    assert before == after
    # The owner has been killed: its place is taken, and what it left is deleted.
    (tmp_path / "run/checkpoints/partial_0123456789abcdef_iter_0000004").mkdir()
    codes, output = Processes(again, None, world_size=1).start().end()
    assert codes == [0] and "2 steps done" in output, output
    assert f"process {pid} on {socket.gethostname()}" in output and "ended without giving it back" in output
    assert newest(tmp_path) == "iter_0000006"
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["iter_0000002", "iter_0000004", "iter_0000006", "latest"]
    assert not list((tmp_path / "run").glob("*lease*"))


def test_a_run_that_lost_its_folder_saves_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path, parallel={}, checkpoint={"interval": 2, "asynchronous": False, "keep_last": 1})
    run, pid = stopped_run(config)
    elsewhere(tmp_path / "run/training")
    partial = tmp_path / "run/checkpoints/partial_0123456789abcdef_iter_0000004"
    partial.mkdir()
    before = contents(tmp_path / "run/checkpoints")
    os.kill(pid, signal.SIGCONT)
    codes, output = run.end()
    assert codes == [1] and "Traceback" not in output, output
    assert re.search("checkpoint not saved: .* was taken over by process 12 on node7 .*; training continues", output)
    assert contents(tmp_path / "run/checkpoints") == before
    assert [path.name for path in (tmp_path / "run").glob("*lease*")] == ["training.lease_4"]


@pytest.mark.parametrize("held", ["training", "node_0", "node_1"])
def test_a_second_launcher_of_a_machine_is_refused(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It writes nothing, and does not call at the place where the launchers of the first run meet."""
    number = 1 if held == "node_1" else 0
    for name, value in {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    config = write_run(tmp_path)
    alive_here(tmp_path / "run" / held)
    before = contents(tmp_path)
    assert cli.main(["train", str(config), "parallel.data=2"]) == 2
    key = "monitor.folder" if held == "training" else f"node {number}, monitor.folder"
    message = rf"{key}: got \S+, which process {os.getpid()} on \S+ \(since .*\) is writing to; .*\n"
    assert re.fullmatch(message, capfd.readouterr().err)
    assert contents(tmp_path) == before
