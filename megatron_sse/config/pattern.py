"""Layer patterns: `5*sse, softmax`."""

import re
from typing import Final

LAYER_KINDS: Final = ("sse", "gla", "gdn", "softmax")
_ENTRY = re.compile(r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)")


def expand_pattern(pattern: str | list[str]) -> list[str]:
    """Layer kinds of one period of a pattern.

    A pattern is a list of entries, in YAML or separated by commas in one string; an entry is a kind or `count*kind`.
    Raises ValueError saying what was wrong.
    """
    entries = pattern.split(",") if isinstance(pattern, str) else pattern
    kinds: list[str] = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise ValueError(f"got {entry.strip()!r}, allowed entries such as softmax or 5*sse, separated by commas")
        count, kind = int(match[1] or 1), match[2]
        if kind not in LAYER_KINDS:
            raise ValueError(f"got {kind!r}, allowed {', '.join(LAYER_KINDS)}")
        if not 1 <= count <= 10_000:
            raise ValueError(f"got a count of {count}, allowed 1 to 10000")
        kinds += [kind] * count
    if not kinds:
        raise ValueError("got an empty pattern, allowed entries such as softmax or 5*sse")
    return kinds
