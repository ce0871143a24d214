"""Finding spikes: a loss or gradient norm far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque

# The least and the most steps that a value is compared with.
SHORTEST, LONGEST = 20, 100
# A lower bound on the deviation, as a part of the median, for values that hardly differ.
SMALLEST_DEVIATION = 0.02
# The median absolute deviation of a normal distribution times this is its standard deviation.
TO_STANDARD = 1.4826


class Spikes:
    """The recent values by name. factor: a value this many deviations above their median is a spike."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.count = 0
        self._last: dict[str, deque[float]] = {}

    def check(self, values: dict[str, float]) -> list[str]:
        """Add the values of a step, skipping those that are not finite; return a text for each that is a spike."""
        found = [text for name, value in values.items() if (text := self._check(name, value)) is not None]
        self.count += bool(found)
        return found

    def _check(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return None
        last = self._last.setdefault(name, deque(maxlen=LONGEST))
        text = None
        if len(last) >= SHORTEST:
            median = statistics.median(last)
            spread = TO_STANDARD * statistics.median(abs(other - median) for other in last)
            deviation = max(spread, SMALLEST_DEVIATION * abs(median), 1e-12)
            if value > median + self.factor * deviation:
                above = f"{(value - median) / deviation:.0f} deviations above {median:.4g}"
                text = f"{name} {value:.4g} is {above}, the median of the last {len(last)} steps"
        last.append(value)
        return text

    def forget(self) -> None:
        """Drop the recent values, as when the next stage of the run begins."""
        self._last.clear()
