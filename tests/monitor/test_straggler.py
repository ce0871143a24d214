"""The monitor names a rank with more work than the others, but not ranks that wait or have different work."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.monitor.straggler import ComputeClock, compare
from tests.monitor.events import read_events, run_and_listen
from tests.training.support import small_run, start
from tests.workers import run_workers

FACTOR = 2.0
# Well above FACTOR, so that neither a fast nor a busy machine hides the slow rank.
SLOWNESS = 5


def test_ranks_are_compared_with_the_median_of_the_others() -> None:
    assert compare([1.0, 1.0, 3.0, 1.0], [0, 0, 0, 0]) == {0: 1.0, 1: 1.0, 2: 3.0, 3: 1.0}
    assert compare([2.0, 5.0], [0, 0]) == {0: 0.4, 1: 2.5}


def test_stages_differ_in_their_work() -> None:
    assert compare([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert compare([1.0, 2.0, 3.0, 3.0], [0, 0, 1, 1])[1] == 2.0
    assert compare([1.0, 3.0], [0, 1]) == {}
    assert compare([0.0, 0.0], [0, 0]) == {}


class FakeEvent:
    """A stand-in for torch.cuda.Event on a device whose time advances by a second with every event."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000 * (end.at - self.at)


def test_on_a_gpu_events_around_the_passes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = ComputeClock("cuda")
    for name in ("forward-backward", "forward-compute", "forward-recv", "backward-compute"):
        clock(name, log_level=1).start()
        clock(name).stop()
    assert clock.take() == 2.0 and clock.take() == 0.0


def run_with_a_slow_rank(folder: Path, parallel: dict[str, Any], slow: int | None) -> list[str]:
    """Return the warnings of a run in which one rank computes SLOWNESS times as long in each pass."""
    training = {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    monitor = {"tensorboard": True, "health_interval": 3, "straggler_factor": FACTOR}
    run = start(small_run(folder, training=training, monitor=monitor, parallel=parallel))
    if slow == int(os.environ["RANK"]):
        assert run.monitor.stragglers is not None
        slow_down(run.monitor.stragglers.clock)
    return run_and_listen(run)


def slow_down(clock: ComputeClock) -> None:
    """Keep the processor busy before each stop of the clock, for a multiple of what the pass took."""
    start, stop = clock.start, clock.stop
    began = 0.0

    def start_pass(barrier: bool = False) -> None:
        nonlocal began
        began = time.thread_time()
        start()

    def stop_late(barrier: bool = False) -> None:
        end = began + SLOWNESS * (time.thread_time() - began)
        while time.thread_time() < end:
            pass
        stop()

    clock.start, clock.stop = start_pass, stop_late  # type: ignore[method-assign]


# Tensor ranks wait for the slow one inside the passes, data-parallel ranks after them.
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {}], ids=str)
@pytest.mark.parametrize("slow", [1, None])
def test_the_slow_rank_is_named_and_equal_ranks_are_not(
    tmp_path: Path, parallel: dict[str, Any], slow: int | None
) -> None:
    small_run(tmp_path)
    lines, *others = run_workers(2, run_with_a_slow_rank, tmp_path, parallel, slow)
    assert others == [[]]
    events = read_events(tmp_path / "run")
    ratios = events["straggler/slowest_over_median"]
    assert [step for step, _ in ratios] == [3, 6]
    if slow is None:
        assert lines == [] and all(1 <= ratio < FACTOR for _, ratio in ratios)
        return
    assert [line.split(":")[0] for line in lines] == [
        f"step {step}/6 | slowest rank 1 ({socket.gethostname()})" for step in (3, 6)
    ]
    assert [rank for _, rank in events["straggler/slowest_rank"]] == [1, 1]
    assert f"{ratios[0][1]:.2f} x the median of the others" in lines[0]
