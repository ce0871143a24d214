"""The processes of a study's runs."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from megatron_sse.interrupts import PR_SET_PDEATHSIG

# Seconds that a run has to save when it is terminated.
PATIENCE = 60
_LIBC = ctypes.CDLL(None)


class RunError(Exception):
    """Failure of a run."""


class Processes:
    """The processes of the runs under way; none is started after `stop`."""

    def __init__(self) -> None:
        self.lock, self.stopped = threading.Lock(), False
        self.running: list[subprocess.Popen] = []

    def run(self, command: list[str], log: Path) -> float:
        """Run a command to its end, its output appended to a log, and return the processor's time of it and of its
        own processes in seconds. Raises RunError."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            with self.lock:
                if self.stopped:
                    raise RunError("not started")
                # In a session of its own, so that Ctrl-C at the terminal reaches it only through `stop`.
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
                self.running.append(process)
            seconds = _wait(process)
        with self.lock:
            self.running.remove(process)
        if process.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RunError(f"exit status {process.returncode}: {last} ({log})")
        return seconds

    def stop(self) -> None:
        """Terminate all processes; training saves first."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            process.terminate()
        end = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen) -> float:
    """Wait for the end of a process, and return its processor time in seconds, its children's included."""
    try:
        # It is not reaped before its times are read.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        # `stop` has reaped it; a run that was stopped has no result.
        process.wait()
        return math.nan
    process.wait()
    # utime, stime, cutime and cstime (see proc(5)).
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _end_with_parent() -> None:
    """Ask Linux to terminate this process when its parent dies.

    Otherwise a study that was killed and started again would have two processes in a run's folder.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
