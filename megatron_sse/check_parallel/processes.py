"""Processes on this machine that join one process group after another."""

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import destroy_groups, init_process_group
from megatron_sse.parallel.stores import LOOPBACK, host_store, stay_on_this_machine

TIMEOUT_MINUTES = 10


class RankError(Exception):
    """Failure of a rank; the message has the rank and its traceback, or how it died."""


class Processes:
    """Up to `size` processes, started when they are first needed and stopped by close()."""

    def __init__(self, size: int, prepare: Callable[[], None] | None = None, tensor: int = 1) -> None:
        """tensor: most ranks that share a layer in any world; a process sets its GPU up once, for all of them."""
        self.size, self.prepare, self.tensor = size, prepare, tensor
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results of function(device, *args) by rank, from a world of the first `num_ranks` processes.

        Raises RankError, and stops all processes, when a rank fails: the others may wait for it forever.
        """
        if not self._processes:
            self._start()
        # Each world gets a store of its own, without the keys of the last one.
        store = host_store(LOOPBACK)
        job = pickle.dumps((num_ranks, store.port, function, args))
        results: dict[int, Any] = {}
        try:
            for rank in range(num_ranks):
                # A process that has died is noticed below, when its result is received.
                with contextlib.suppress(BrokenPipeError):
                    self._pipes[rank].send_bytes(job)
            while len(results) < num_ranks:
                waiting = [rank for rank in range(num_ranks) if rank not in results]
                ready = wait([self._pipes[rank] for rank in waiting])
                for rank in waiting:
                    if self._pipes[rank] in ready:
                        results[rank] = self._receive(rank)
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(num_ranks)]

    def _start(self) -> None:
        context = get_context("spawn")
        with _interrupts_wait():
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self.size, theirs, self.prepare, self.tensor), daemon=True
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def _receive(self, rank: int) -> Any:
        try:
            failure, result = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            code = self._processes[rank].exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
            raise RankError(f"rank {rank} {how}") from None
        if failure is not None:
            raise RankError(f"rank {rank}:\n{failure}")
        return result

    def close(self) -> None:
        """Stop the processes, including any that hang in a collective."""
        for process in self._processes:
            process.kill()
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join()
            pipe.close()
        self._pipes, self._processes = [], []


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of the block, and block SIGINT in the processes started in it.

    Ctrl-C reaches all processes of a terminal; the started ones must leave it to this process to end them.
    """
    # The tracker is started first, because its start unblocks signals.
    resource_tracker.ensure_running()
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda sent, frame: arrived.append(sent)) for number in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for sent in arrived:
            signal.raise_signal(sent)


def _serve(rank: int, size: int, pipe: Connection, prepare: Callable[[], None] | None, tensor: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    # torch's name for: the store is there already, connect to it.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ.update(MASTER_ADDR=LOOPBACK, RANK=str(rank), LOCAL_RANK=str(rank))
    stay_on_this_machine()
    if prepare is not None:
        prepare()
    # EOFError: the parent closed the pipe, so the command has ended.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send_bytes(_answer(rank, pipe.recv_bytes(), tensor))


def _answer(rank: int, job: bytes, tensor: int) -> bytes:
    try:
        num_ranks, port, function, args = pickle.loads(job)
        os.environ.update(WORLD_SIZE=str(num_ranks), MASTER_PORT=str(port))
        device = setup_device(rank, tensor)
        init_process_group(device, TIMEOUT_MINUTES)
        result = pickle.dumps((None, function(device, *args)))
        destroy_groups()
        dist.destroy_process_group()
        return result
    except Exception:
        # The process group stays open: closing it would make the others fail on the lost connection, and their error
        # could be read before this one.
        return pickle.dumps((traceback.format_exc(), None))
