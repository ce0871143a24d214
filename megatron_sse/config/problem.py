"""What a check of the settings reports, and how a setting's value is shown in a message."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Dotted key, the value given, and what is allowed.
Found = Iterator[tuple[str, Any, str]]


@dataclass(frozen=True)
class Problem:
    """A setting that cannot work: its dotted key, and in one line what was given and what is allowed."""

    key: str
    text: str


def show(value: Any) -> str:
    """Return a value as YAML writes it, short enough for one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
