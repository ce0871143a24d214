"""Pools of processes that run a function on every rank; one per world size, kept until the tests end."""

import contextlib
import gc
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_sse.parallel import device, groups

# A rank whose peer failed, or runs other collectives, would wait forever.
SECONDS_TO_ANSWER = 900


class WorkerError(Exception):
    """Failure of a function on some rank; the message has the rank and its traceback."""


def fork_context() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported what takes seconds to import.

    Each process that runs tests has one such server, always with the same imports.
    """
    context = get_context("forkserver")
    # Test modules import pytest, and torch's dispatch modes TorchDynamo, which a run itself does without.
    ours = ["megatron_sse.training.loop", "megatron_sse.cli", "megatron_sse.launch.start"]
    context.set_forkserver_preload([*ours, "pytest", "torch._dynamo"])
    # The server starts here, where no signal is blocked, since forked processes inherit its signal mask.
    forkserver.ensure_running()
    return context


class WorkerPool:
    """A pool of `world_size` processes in one world that run the functions sent to them.

    They use the CPU and gloo; with `gpus` one GPU each and NCCL.
    """

    def __init__(self, world_size: int, gpus: bool = False) -> None:
        context = fork_context()
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Daemonic processes could not start others, as saving a distributed checkpoint does.
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs, gpus), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return function(*args) of all ranks. Raises WorkerError when a rank raises, dies or does not answer."""
        job = pickle.dumps((function, args))
        for pipe in self._pipes:
            # A process that has died is noticed below, when its result is received.
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(job)
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            waiting = [rank for rank in range(len(self._pipes)) if rank not in results]
            ready = wait([self._pipes[rank] for rank in waiting], SECONDS_TO_ANSWER)
            if not ready:
                raise WorkerError(f"no answer from ranks {waiting} in {SECONDS_TO_ANSWER} seconds")
            for rank in waiting:
                if self._pipes[rank] in ready:
                    results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self._pipes))]

    def _receive(self, rank: int) -> Any:
        try:
            failure, result = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            raise WorkerError(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None
        if failure is not None:
            raise WorkerError(f"rank {rank}:\n{failure}")
        return result

    def close(self) -> None:
        """Stop the processes, including any that hang in a collective, and their children."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
            pipe.close()


_pools: dict[tuple[int, bool], WorkerPool] = {}


def run_workers(world_size: int, function: Callable[..., Any], *args: Any, gpus: bool = False) -> list[Any]:
    """Call function(*args) on every rank of a gloo world of `world_size` processes, and return the results by rank.

    With `gpus` each process has a GPU of its own; otherwise none sees one, also where there are some.

    `function` must be importable (module level), arguments and results picklable, as CPU tensors are. It is
    called without model-parallel groups, and those it makes are destroyed afterwards. Raises WorkerError, with the
    rank and its traceback, when a rank fails; the pool is then thrown away, since the other ranks may hang.
    """
    kind = world_size, gpus
    if kind not in _pools:
        _pools[kind] = WorkerPool(world_size, gpus)
    try:
        return _pools[kind].run(function, *args)
    except BaseException:
        _pools.pop(kind).close()
        raise


def close_pools() -> None:
    """Stop all pools; conftest.py calls this when the tests end."""
    while _pools:
        _pools.popitem()[1].close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, world_size: int, port: int, pipe: Connection, gpus: bool) -> None:
    torch.set_num_threads(1)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.device_count() < world_size:
        raise RuntimeError(f"{world_size} GPUs asked for, {torch.cuda.device_count()} found")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    groups.init_process_group(device.setup_device(rank))
    # Imported modules stay. Without the freeze, every garbage collection after a function would take 0.25 s for them.
    gc.freeze()
    # EOFError: the tests have ended.
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(job: bytes) -> bytes:
    try:
        function, args = pickle.loads(job)
        return pickle.dumps((None, function(*args)))
    except Exception:
        return pickle.dumps((traceback.format_exc(), None))
    finally:
        _drop_groups()


def _drop_groups() -> None:
    """Destroy the groups that a function created, so that the next one starts without groups."""
    groups.destroy_groups()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # Models contain reference cycles and keep groups alive.
    gc.collect()
