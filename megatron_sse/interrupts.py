"""SIGINT (Ctrl-C) from the first line of a program to its last, and while torch waits for other processes."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_sse.errors import INTERRUPT_EXIT


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
def blocked_for_children() -> Iterator[None]:
    """Start processes in the block that get a SIGINT only once they call run_program."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


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
