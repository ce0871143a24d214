"""Wrong input: refused with its place, or skipped and counted. Nothing is skipped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from megatron_sse.errors import UserError

# Kinds, as the summary names them.
BROKEN = "broken JSON"
INVALID = "invalid UTF-8"
MISSING = "missing field"
CHAT = "chat not usable"
EMPTY = "empty document"
BINARY = "binary file"
BLANK = "blank line"
HIDDEN = "hidden file, hidden folder or link"

WRONG = (BROKEN, INVALID, MISSING, CHAT)
_OPTIONS = {kind: "--wrong skip" for kind in WRONG} | {EMPTY: "--empty skip"}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Place:
    """The place of a document: a file, and its row (from 1) or the byte at which its line starts."""

    path: str
    row: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        row = self.row if self.offset is None else count_lines(self.path, self.offset) + 1
        return self.path if row is None else f"{self.path}:{row}"


def count_lines(path: str, end: int) -> int:
    """Count the line ends in the first `end` bytes of a file."""
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(_BLOCK, end))):
            lines += block.count(b"\n")
            end -= len(block)
    return lines


class Tally:
    """Counts of skipped input by kind; a kind in `refused` raises UserError instead, which names the place."""

    def __init__(self, refused: Collection[str]):
        self.refused = frozenset(refused)
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, place: Place, reason: str) -> None:
        """Count an input of this kind. Raises UserError where the kind is refused."""
        if kind in self.refused:
            raise UserError(f"{place}: {reason}; fix it, or skip and count such input with {_OPTIONS[kind]}")
        self.counts[kind] += 1
