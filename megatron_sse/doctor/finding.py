"""One line of what the doctor says."""

from dataclasses import dataclass
from typing import Final

GOOD: Final = "✓"
BAD: Final = "✗"
OPEN: Final = "–"


@dataclass(frozen=True)
class Finding:
    """mark: GOOD, BAD, or OPEN where there was nothing to check. text: what was found and, if bad, what to do."""

    mark: str
    name: str
    text: str

    def line(self) -> str:
        return f"{self.mark} {self.name:<18} {self.text}"
