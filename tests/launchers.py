"""Launchers in processes of their own, one for each machine, whose processes run a small script."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.workers import fork_context

SECONDS_TO_END = 120
# The script ends with its launcher, as a training process does.
SCRIPT = """\
import ctypes, os, signal, sys, threading, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def say(text): os.write(1, (text + "\\n").encode())  # in one piece, also where two processes write
def wait(): threading.Event().wait()
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Launcher:
    """One launcher and the file that it and its processes write to."""

    process: BaseProcess
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the output has `text`; fail where the launcher ends without it."""
        while text not in self.output:
            self.process.join(0.05)
            assert self.process.exitcode is None or text in self.output, self.output

    def send(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def end(self) -> int | None:
        """Wait for the launcher and return its exit status."""
        self.process.join(SECONDS_TO_END)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def start_launcher(
    folder: Path,
    script: str,
    rank: int = 0,
    count: int = 1,
    port: int = 0,
    per_node: int = 1,
    max_restarts: int = 0,
    address: str = "localhost",
) -> Launcher:
    """Start the launcher of machine `rank` of `count`, with `per_node` processes that run SCRIPT, then `script`."""
    path = folder / f"script{rank}.py"
    path.write_text(SCRIPT + script)
    place = (count, rank, address, port)
    return _start(folder / f"output{rank}", _launch, str(path), place, per_node, max_restarts)


def start_command(folder: Path, script: str, arguments: list[str]) -> Launcher:
    """Start the command line as a user does; the processes that it starts run SCRIPT, then `script`, not Python."""
    path = folder / "script"
    path.write_text(f"#!{sys.executable}\n{SCRIPT}{script}")
    path.chmod(0o700)
    return _start(folder / "output", _run_command, str(path), arguments)


def _start(log: Path, target: Callable[..., None], *arguments: Any) -> Launcher:
    log.touch()
    process = fork_context().Process(target=_write_to, args=(str(log), target, *arguments))
    process.start()
    return Launcher(process, log)


def _write_to(log: str, target: Callable[..., None], *arguments: Any) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    target(*arguments)


def _run_command(program: str, arguments: list[str]) -> None:
    from megatron_sse.cli import main

    sys.executable = program
    sys.exit(main(arguments))


def _launch(script: str, place: tuple[int, int, str, int], per_node: int, max_restarts: int) -> None:
    from megatron_sse.errors import USER_ERROR_EXIT, UserError
    from megatron_sse.launch.agent import run_processes
    from megatron_sse.launch.nodes import Nodes
    from megatron_sse.logs import set_up_logging

    set_up_logging(rank=0)
    try:
        status = run_processes([script], Nodes(*place), per_node, max_restarts, timeout_minutes=1)
    except UserError as error:
        print(error)
        status = USER_ERROR_EXIT
    sys.stdout.flush()
    sys.exit(status)
