"""Warnings of a loss or gradient norm far above the last ones, and of nothing else (F20)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sse.monitor.spikes import LONGEST, SHORTEST, Spikes
from tests.monitor.events import read_events, run_and_listen
from tests.training.support import small_run, start
from tests.workers import run_workers

FACTOR = 10.0


def check(values: Any, factor: float = FACTOR) -> list[int]:
    """Return the numbers of the values that are spikes."""
    spikes = Spikes(factor)
    found = [number for number, value in enumerate(values) if spikes.check({"loss": float(value)})]
    assert spikes.count == len(found)
    return found


def curve(num_steps: int = 400) -> np.ndarray:
    """Return a loss curve that falls from 8 to 2 with the noise of small batches."""
    return 2 + 6 * np.exp(-np.arange(num_steps) / 60) + np.random.default_rng(0).normal(0, 0.1, num_steps)


def test_a_falling_noisy_loss_has_no_spike() -> None:
    assert check(curve()) == []


def test_a_spike_is_found_and_the_values_after_it_are_not() -> None:
    values = curve()
    values[300] += 3
    assert check(values) == [300]
    median, deviation = (
        np.median(values[200:300]),
        1.4826 * np.median(abs(values[200:300] - np.median(values[200:300]))),
    )
    above = f"{(values[300] - median) / deviation:.0f} deviations above {median:.4g}"
    assert describe(values) == [f"loss {values[300]:.4g} is {above}, the median of the last 100 steps"]


def describe(values: Any) -> list[str]:
    spikes = Spikes(FACTOR)
    return [text for value in values for text in spikes.check({"loss": float(value)})]


def test_a_lower_factor_finds_more() -> None:
    values = curve()
    values[300] += 1
    assert check(values, 20.0) == [] and check(values, 5.0) == [300]


def test_equal_values_have_a_least_deviation() -> None:
    assert check([2.0] * 50 + [2.3]) == []
    assert check([2.0] * 50 + [2.5]) == [50]


def test_too_few_values_are_compared_with_nothing() -> None:
    assert check([1.0] * (SHORTEST - 1) + [100.0]) == []
    assert check([1.0] * SHORTEST + [100.0]) == [SHORTEST]


def test_a_new_level_is_warned_of_until_it_is_the_usual_one() -> None:
    assert check([1.0] * LONGEST + [3.0] * LONGEST) == list(range(LONGEST, LONGEST + LONGEST // 2))


def test_values_that_are_not_finite_are_left_out() -> None:
    assert check([1.0] * SHORTEST + [math.nan, math.inf, 1.0, 9.0]) == [SHORTEST + 3]


def test_names_are_compared_apart_and_a_step_counts_once() -> None:
    spikes = Spikes(FACTOR)
    for _ in range(SHORTEST):
        spikes.check({"loss": 2.0, "grad norm": 100.0})
    assert spikes.check({"loss": 2.0, "grad norm": 100.0}) == []
    both = spikes.check({"loss": 90.0, "grad norm": 900.0})
    assert [text.split(" is ")[0] for text in both] == ["loss 90", "grad norm 900"] and spikes.count == 1
    spikes.forget()
    assert spikes.check({"loss": 900.0, "grad norm": 9000.0}) == []


def run_with_a_high_rate(folder: Path, high_at: int | None) -> list[str]:
    """Return the warnings of a run whose learning rate is far too high in one step."""
    training = {"steps": 36, "global_batch_size": 4, "precision": "fp32"}
    run = start(small_run(folder, training=training, monitor={"tensorboard": True}))
    rate = run.learning_rate
    run.learning_rate = lambda step: 3.0 if step == high_at else rate(step)  # type: ignore[method-assign]
    return run_and_listen(run)


@pytest.mark.parametrize("high_at", [30, None])
def test_f20_a_spike_of_a_run_is_warned_of_and_counted(tmp_path: Path, high_at: int | None) -> None:
    small_run(tmp_path)
    [lines] = run_workers(1, run_with_a_high_rate, tmp_path, high_at)
    counts = dict(read_events(tmp_path / "run")["train/spikes"])
    if high_at is None:
        assert lines == [] and set(counts.values()) == {0}
        return
    # The step after the one that spoilt the weights is the first with a high loss.
    assert lines[0].startswith("step 31/36 | SPIKE: loss "), lines
    assert counts[30] == 0 and counts[31] == 1
