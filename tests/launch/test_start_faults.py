"""Processes that are interrupted, terminated, lost or stopped before the first step, from the first process on (F47).

Each ends with a line at most, and a status that is documented.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.checkpoint.processes import GROUPS, MEET, MODEL, Fault, Processes
from tests.training.support import small_run

INTERRUPTED = "E interrupted; nothing saved since the last checkpoint"
MET = r"E rank 0: while the processes met, not all processes met within parallel.timeout_minutes \(.+\)"

# Fault: exit codes, the last line, the rank that has to be killed because it was stopped.
FAULTS: dict[str, tuple[Fault, tuple[int, int], str]] = {
    "interrupted before the processes meet": (Fault("interrupt", MEET, (0, 1)), (130, 130), INTERRUPTED),
    "interrupted while the others wait": (Fault("interrupt", GROUPS, (0, 1)), (130, 130), INTERRUPTED),
    "interrupted with the model": (Fault("interrupt", MODEL, (0, 1)), (130, 130), INTERRUPTED),
    "terminated while groups are made": (Fault("terminate", GROUPS, (0, 1)), (0, 0), "I there is no checkpoint"),
    "killed before the processes meet": (Fault("kill", MEET), (1, -9), MET),
    "killed while groups are made": (Fault("kill", GROUPS), (1, -9), r"E rank 0: .* no answer from rank 1"),
    "the first killed while groups are made": (Fault("kill", GROUPS, (0,)), (-9, 1), r"E rank 1: .* lost.*"),
    "stopped before the processes meet": (Fault("stop", MEET), (1, -9), MET),
    "stopped while groups are made": (Fault("stop", GROUPS), (1, -9), r"E rank 0: .* timed out; no answer from rank 1"),
    "stopped with the model": (Fault("stop", MODEL), (1, -9), r"E rank 0: .* timed out; no answer from rank 1"),
}


def write_run(folder: Path, **sections: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    training = {"steps": 2, "global_batch_size": 2, "precision": "fp32"}
    path.write_text(small_run(folder, training=training, **sections).to_yaml())
    return path


def test_the_phases_before_the_first_step(tmp_path: Path) -> None:
    """All runs at once, since most of them wait."""
    runs = {}
    for number, (name, (fault, _, _)) in enumerate(FAULTS.items()):
        waits = fault.act in ("kill", "stop")
        config = write_run(tmp_path / str(number), parallel={"timeout_minutes": 0.3} if waits else {})
        runs[name] = Processes(config, fault).start()
    stopped = {name: fault.ranks if fault.act == "stop" else () for name, (fault, _, _) in FAULTS.items()}
    ended = {name: run.end(stopped[name]) for name, run in runs.items()}
    for name, (_, codes, line) in FAULTS.items():
        found, output = ended[name]
        assert found == list(codes), f"{name}: {found}\n{output}"
        assert "Traceback" not in output, f"{name}\n{output}"
        assert re.search(f"^[0-9:]+ {line}$", output.splitlines()[-1]), f"{name}\n{output}"


def start_launcher(folder: Path) -> subprocess.Popen[str]:
    """Start a run of two processes as a user does, as the leader of a session of its own."""
    config = write_run(folder, parallel={"data": 2})
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sse", "train", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_children(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the launcher has started both processes, and return them."""
    output = launcher.stdout
    assert output is not None
    while "torchrun" not in output.readline():
        pass
    while len(children := psutil.Process(launcher.pid).children()) < 2:
        assert launcher.poll() is None
    return children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_from_the_first_process_on(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM go to all processes when they have just been started; SIGKILL to one of them."""
    launcher = start_launcher(tmp_path)
    first, _ = children = wait_for_children(launcher)
    if number == signal.SIGKILL:
        first.kill()
    else:
        os.killpg(launcher.pid, number)
    output, _ = launcher.communicate()
    assert launcher.returncode == 128 + number, output
    assert "Traceback" not in output, output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_the_launcher_killed_and_started_again(tmp_path: Path) -> None:
    """Processes that have not begun to watch their launcher when it is killed end all the same."""
    launcher = start_launcher(tmp_path)
    children = wait_for_children(launcher)
    launcher.kill()
    # Until both have closed it.
    output, _ = launcher.communicate()
    assert "Traceback" not in output, output
    psutil.wait_procs(children)
    launcher = start_launcher(tmp_path)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0 and "checkpoint saved" in output, output
