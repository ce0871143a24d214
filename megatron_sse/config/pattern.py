"""Layer patterns: `5*sse, softmax`."""

import re
from itertools import groupby
from typing import Final

from megatron_sse.recurrence import RECURRENCES

MAX_LAYERS: Final = 10_000
LAYER_KINDS: Final = ("sse", *RECURRENCES, "softmax")
_ENTRY = re.compile(r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)")


def expand_pattern(pattern: str | list[str]) -> list[str]:
    """Return the layer kinds of one period of a pattern.

    A pattern is a list of entries, in YAML or separated by commas in one string; an entry is a kind or `count*kind`.
    Raises ValueError, whose text says what is wrong.
    """
    entries = pattern.split(",") if isinstance(pattern, str) else pattern
    kinds: list[str] = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise ValueError(f"got {entry.strip()!r}, allowed entries such as softmax or 5*sse, separated by commas")
        # No more digits than the bound has: int() of thousands of them is slow, or refused.
        count, kind = int((match[1] or "1")[:9]), match[2]
        if kind not in LAYER_KINDS:
            raise ValueError(f"got {kind!r}, allowed {', '.join(LAYER_KINDS)}")
        if not 1 <= count <= MAX_LAYERS:
            raise ValueError(f"got a count of {count}, allowed 1 to {MAX_LAYERS}")
        kinds += [kind] * count
        if len(kinds) > MAX_LAYERS:
            raise ValueError(f"got more than {MAX_LAYERS} layers, allowed 1 to {MAX_LAYERS}")
    if not kinds:
        raise ValueError("got an empty pattern, allowed entries such as softmax or 5*sse")
    return kinds


def shorten_pattern(kinds: list[str]) -> str:
    """Return the shortest pattern that expands and repeats to these layer kinds."""
    period = next(n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n))
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds[:period])]
    return ", ".join(kind if count == 1 else f"{count}*{kind}" for kind, count in runs)
