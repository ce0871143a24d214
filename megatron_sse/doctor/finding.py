"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Final

GOOD: Final = "✓"
BAD: Final = "✗"
OPEN: Final = "–"


@dataclass(frozen=True)
class Finding:
    """mark: GOOD, BAD, or OPEN where there is nothing to check. text: what was found and, if bad, what to do."""

    mark: str
    name: str
    text: str

    def line(self) -> str:
        return f"{self.mark} {self.name:<18} {self.text}"
