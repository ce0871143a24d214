"""A line of JSON for each reported step, in a file that any tool can read while the run goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from pathlib import Path

_MAX_LINE = 1 << 20
_STEP = re.compile(rb'\{"step": (\d+),')


class Metrics:
    """The scalars of a run that starts at step `first_step`, one line a step in the order of the steps.

    Lines of steps from `first_step` on, which a run that has crashed has left, are dropped with the first write.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path, self.first_step = path, first_step
        self.step: int | None = None
        self.line: dict[str, float | None] = {}
        # Where the line of `step` begins.
        self.begin = 0

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write the line of a step, or add scalars to it. Raises OSError."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without waiting for the reader of a pipe: that is an error like others.
        with open(self.path, "ab", buffering=0, opener=_open_without_waiting) as file:
            size = file.tell()
            if self.step is None:
                self.begin = size = self._purge()
                file.truncate(size)
            if step != self.step:
                self.begin, self.line = size, {"step": step, "time": round(time.time(), 3)}
            elif self.begin > size:
                # The file was moved or emptied.
                self.begin = size
            line = self.line | values
            self.step, self.line = step, line
            file.truncate(self.begin)
            content = json.dumps(line).encode() + b"\n"
            if file.write(content) < len(content):
                # Nothing behind a part of a line could be read.
                file.truncate(self.begin)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _purge(self) -> int:
        """Return the number of bytes to keep: complete lines of steps before `first_step`."""
        kept = 0
        with self.path.open("rb") as file:
            while line := file.readline(_MAX_LINE):
                match = _STEP.match(line)
                if match is None or int(match[1]) >= self.first_step or not line.endswith(b"\n"):
                    break
                kept += len(line)
        return kept


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
