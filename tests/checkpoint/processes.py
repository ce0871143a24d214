"""Complete command-line runs in processes of their own, with a fault injected into one of them."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.workers import fork_context

# Where the fault happens: in a step, or while the second checkpoint is written, in the background or not.
STEP, SAVE = "step", "save"
# After a step all weights become nan or huge; or a batch makes the loss of the step nan.
WEIGHTS, BATCH = "weights", "batch"
# Or before the first step: when a function of megatron_sse.training.loop is called.
MEET, GROUPS, MODEL = "init_process_group", "init_groups", "build_model"
FAULTY_STEP, FAULTY_SAVE = 3, 2
EVERY = 0
SECONDS_TO_END = 120


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("injected")


ACTS: dict[str, Callable[[], None]] = {
    "kill": send(signal.SIGKILL),
    "terminate": send(signal.SIGTERM),
    "stop": send(signal.SIGSTOP),
    "raise": fail,
    "abort": send(signal.SIGABRT),
    "interrupt": send(signal.SIGINT),
}


@dataclass(frozen=True)
class Fault:
    """A fault: what happens (a name in ACTS, or a system error number), where, and on which ranks."""

    act: str | int
    point: str
    ranks: tuple[int, ...] = (1,)
    step: int = FAULTY_STEP

    def happen(self) -> None:
        if isinstance(self.act, int):
            raise OSError(self.act, os.strerror(self.act))
        ACTS[self.act]()


@dataclass
class Processes:
    """The processes of one run, whose output goes to one file in the order of writing."""

    config: Path
    fault: Fault | None
    world_size: int = 2
    running: list[BaseProcess] = field(default_factory=list)

    def start(self) -> "Processes":
        # Imports are made once, in the process from which the others are forked.
        context = fork_context()
        port = _free_port()
        for rank in range(self.world_size):
            args = (rank, self.world_size, port, str(self.config), self.fault, str(self.log))
            self.running.append(context.Process(target=run_rank, args=args))
        for process in self.running:
            process.start()
        return self

    @property
    def log(self) -> Path:
        return self.config.with_suffix(".log")

    def end(self, stopped: tuple[int, ...] = ()) -> tuple[list[int | None], str]:
        """Wait for all processes and return their exit codes (-9: killed) and the output.

        Those in `stopped` are killed; the others must end by themselves.
        """
        for rank, process in enumerate(self.running):
            if rank not in stopped:
                process.join(SECONDS_TO_END)
        hanging = [rank for rank, process in enumerate(self.running) if process.is_alive() and rank not in stopped]
        for process in self.running:
            process.kill()
            process.join()
        output = self.log.read_text()
        assert hanging == [], output
        return [process.exitcode for process in self.running], output


def run_rank(rank: int, world_size: int, port: int, config: str, fault: Fault | None, log: str) -> None:
    """Run one process of a run, as torchrun starts it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    import torch

    from megatron_sse.cli import main

    torch.set_num_threads(1)
    if fault is not None and rank in fault.ranks:
        _inject(fault)
    sys.exit(main(["train", config]))


def _inject(fault: Fault) -> None:
    from megatron_sse import durable
    from megatron_sse.training import loop
    from megatron_sse.training.step import Trainer

    if fault.point in (MEET, GROUPS, MODEL):
        start = getattr(loop, fault.point)

        def fail_first(*args: Any, **options: Any) -> Any:
            fault.happen()
            return start(*args, **options)

        setattr(loop, fault.point, fail_first)
        return
    calls = 0

    def count(limit: int) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            fault.happen()

    take_step = Trainer.train_step
    if fault.point == STEP:

        def train_step(self: Trainer, batches: Any) -> Any:
            count(fault.step)
            return take_step(self, batches)

        Trainer.train_step = train_step  # type: ignore[method-assign]
        return
    if fault.point in (WEIGHTS, BATCH):

        def poisoned_step(self: Trainer, batches: Any) -> Any:
            nonlocal calls
            calls += 1
            taken = list(islice(batches, self.num_micro_batches))
            if fault.point == BATCH and fault.step in (calls, EVERY):
                taken[0].loss_mask_BL[0, 0] = float("nan")
            result = take_step(self, iter(taken))
            if fault.point == WEIGHTS and calls == fault.step:
                for chunk in self.chunks:
                    for parameter in chunk.parameters():
                        parameter.data.mul_(float(fault.act))
            return result

        Trainer.train_step = poisoned_step  # type: ignore[method-assign]
        return

    class Faulty(durable.HashedFile):
        def __init__(self, path: Path, is_stopped: Callable[[], bool]):
            super().__init__(path, is_stopped)
            self.is_shard = path.suffix == ".distcp"
            self.writes = 0
            # torch's writer does not pass on exceptions from below it.
            if self.is_shard and fault.act == "raise":
                count(FAULTY_SAVE)

        def write(self, data: Any) -> int:
            self.writes += 1
            # The write fails in the middle of the file.
            if self.is_shard and self.writes == 10 and fault.act != "raise":
                try:
                    count(FAULTY_SAVE)
                except OSError as error:
                    self.error = error
            return super().write(data)

    durable.HashedFile = Faulty  # type: ignore[misc]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
