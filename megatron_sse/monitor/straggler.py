"""Finding a process that is slower than the others, by the time that each computes (not waiting for the others)."""

from __future__ import annotations

import socket
import statistics
import time

import torch
import torch.distributed as dist

COMPUTE = ("forward-compute", "backward-compute")


class ComputeClock:
    """A clock of the seconds that this rank spends in forward and backward passes.

    Megatron-Core's schedules call `config.timers(name).start()` and `.stop()` around the passes of every micro-batch,
    but not around the exchange with other pipeline stages and the sum of gradients. On a CPU it measures the processor
    time of the thread, which does not advance in collectives; on a GPU the time between two events.
    """

    def __init__(self, device_type: str) -> None:
        self.on_gpu = device_type == "cuda"
        self._started = 0.0
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []

    def __call__(self, name: str, log_level: int | None = None) -> ComputeClock | NoClock:
        return self if name in COMPUTE else NO_CLOCK

    def start(self, barrier: bool = False) -> None:
        if self.on_gpu:
            self._record()
        else:
            self._started = time.thread_time()

    def stop(self, barrier: bool = False) -> None:
        if self.on_gpu:
            self._record()
        else:
            self._seconds += time.thread_time() - self._started

    def take(self) -> float:
        """Return the seconds since the last call; only valid once the device has finished all queued work."""
        for start, end in zip(self._events[::2], self._events[1::2], strict=True):
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


class NoClock:
    """A stand-in for Megatron-Core's other timers, which are not read."""

    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


NO_CLOCK = NoClock()


class Stragglers:
    """A comparison of the ranks' compute times; making one is collective over all processes.

    factor: a rank is a straggler if it takes this many times the others' median. stage: number of this rank's pipeline
    stage; ranks are compared only within a stage, since stages differ in their work.
    """

    def __init__(self, factor: float, stage: int, device_type: str) -> None:
        self.factor, self.stage, self.device_type = factor, stage, device_type
        self.clock = ComputeClock(device_type)
        self.seconds = 0.0
        self.hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())

    def step(self) -> None:
        """Add the time of a step, after its loss has been read (so that the device has finished it)."""
        # At every step, since thousands of events would add up until the report.
        self.seconds += self.clock.take()

    def report(self) -> tuple[dict[str, float], str | None]:
        """Return scalars of the steps since the last report, and a warning where a rank is a straggler.

        Collective over all processes; the result is the same on every rank.
        """
        mine_2 = torch.tensor([self.seconds, self.stage], dtype=torch.float64, device=self.device_type)
        self.seconds = 0.0
        gathered = mine_2.new_empty(2 * len(self.hosts))
        dist.all_gather_into_tensor(gathered, mine_2)
        seconds, stages = gathered.view(-1, 2).T.tolist()
        ratios = compare(seconds, stages)
        if not ratios:
            return {}, None
        slowest = max(ratios, key=lambda rank: ratios[rank])
        ratio = ratios[slowest]
        warning = None
        if ratio >= self.factor:
            warning = (
                f"slowest rank {slowest} ({self.hosts[slowest]}): {ratio:.2f} x the median of the others in forward "
                f"and backward passes"
            )
        return {"straggler/slowest_rank": slowest, "straggler/slowest_over_median": ratio}, warning


def compare(seconds: list[float], stages: list[float]) -> dict[int, float]:
    """Return each rank's time over the median of the others on its stage, without ranks that are alone on theirs."""
    ratios = {}
    for rank, (mine, stage) in enumerate(zip(seconds, stages, strict=True)):
        others = [seconds[r] for r in range(len(seconds)) if r != rank and stages[r] == stage]
        if others and (median := statistics.median(others)) > 0:
            ratios[rank] = mine / median
    return ratios
