"""SIGINT (Ctrl-C) from the first line of a program to its last, while processes start, and while torch waits for them.

Also the end of a process with its launcher.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_sse.errors import INTERRUPT_EXIT

# An option of prctl: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1
# The variable in which a launcher tells its processes its number.
_LAUNCHER = "MEGATRON_SSE_LAUNCHER"


def run_program(run: Callable[[], int]) -> None:
    """Call `run`, which imports what it needs, and end the process with the status that it returns."""
    try:
        # The launcher starts processes with SIGINT blocked: Python would print a traceback while it starts itself.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        status = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = INTERRUPT_EXIT
    sys.exit(status)


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes in the block, which get a SIGINT only once they call run_program."""
    os.environ[_LAUNCHER] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def end_with_launcher() -> None:
    """Let this process be killed when its launcher ends, or now if that has ended already.

    It would otherwise keep its GPU, and the others would wait for it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_LAUNCHER, str(os.getppid())) != str(os.getppid()):
        signal.raise_signal(signal.SIGKILL)


@contextmanager
def ending_at_once(report: Callable[[], None]) -> Iterator[None]:
    """End the process at a SIGINT in the block, after a call of `report`, although the main thread may wait in C++.

    Handlers in Python would run only after the wait. They must not raise in the block.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    threading.Thread(target=_end_at_interrupt, args=(reader, report), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        writer.close()


def _end_at_interrupt(reader: socket.socket, report: Callable[[], None]) -> None:
    with reader:
        # An empty read: the block is over.
        while number := reader.recv(1):
            if number[0] == signal.SIGINT:
                report()
                os._exit(INTERRUPT_EXIT)
