"""What a rehearsal found: operations that make a run on a GPU wait, copy slowly or fail, by file and line."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType

import megatron_sse

ROOT = Path(megatron_sse.__file__).resolve().parents[1]
_HERE = str(Path(__file__).parent)
_LIBRARY = str(Path(os.__file__).parent)
_PACKAGES = "site-packages/"


class Kind(StrEnum):
    """Kinds of findings."""

    HOST_READ = "the host reads a value from the GPU"
    BOOLEAN_INDEX = "boolean indexing, whose result has a size that only the GPU knows"
    UNKNOWN_SIZE = "a result whose size or value only the GPU knows"
    PAGEABLE_COPY = "a copy to the GPU from memory that is not pinned"
    BLOCKING_COPY = "a copy to the host that is waited for"
    WAIT = "the host waits for the GPU"
    MIXED_DEVICES = "tensors of the host and of the GPU in one operation"
    CPU_COLLECTIVE = "a collective on a tensor of the host"
    OBJECT_COLLECTIVE = "a collective on Python objects"
    COPIED_AHEAD = "more than one micro-batch copied ahead of the one that is computed"
    LEFT_ON_HOST = "a parameter or buffer that stayed on the host"
    NO_DEVICE_ID = "init_process_group without device_id"


class Phase(StrEnum):
    """When something was found."""

    SETUP = "set-up"
    STEP = "step"
    VALIDATION = "validation"
    BETWEEN = "between steps"


# Found at any time, these would break or slow down every step.
ALWAYS_WRONG = {Kind.LEFT_ON_HOST, Kind.NO_DEVICE_ID}
# Phases in which the host only reads what is below.
WATCHED = {Phase.STEP, Phase.VALIDATION}
# The values that the host needs once per step, or validation: where they are read.
ONCE = {
    # Whether there are tokens to divide the gradients by.
    (Kind.HOST_READ, "megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads"),
    # The gradient norm, before the optimizer's step.
    (Kind.HOST_READ, "megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32"),
    # The losses, which are checked and reported.
    (Kind.HOST_READ, "megatron_sse/training/step.py", "_reduce"),
}


@dataclass(frozen=True, order=True)
class Finding:
    """A finding, with its place (the innermost frame outside torch) and the line of this package that led there."""

    phase: Phase
    kind: Kind
    file: str
    line: int
    function: str
    detail: str = ""
    caller: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.file}:{self.line} {self.function}: {self.kind}{detail}{self.caller}"


class Findings:
    """All findings of one rank, with how often each was made. phase: that of what is found from now on."""

    def __init__(self) -> None:
        self.phase = Phase.SETUP
        # How often each of the watched phases was entered.
        self.entered: Counter[Phase] = Counter()
        self.counts: Counter[Finding] = Counter()

    def note(self, kind: Kind, detail: str = "") -> None:
        """Add a finding at the line that is running."""
        file, line, function, caller = _place()
        self.counts[Finding(self.phase, kind, file, line, function, detail, caller)] += 1

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count what is found in the block as found in a phase."""
        self.phase = phase
        self.entered[phase] += 1
        try:
            yield
        finally:
            self.phase = Phase.BETWEEN

    def wrong(self) -> list[Finding]:
        """Return what has to be mended: what is always wrong, and what makes a step or validation wait needlessly."""
        return sorted(finding for finding in self.counts if finding.kind in ALWAYS_WRONG or self._waits(finding))

    def _waits(self, finding: Finding) -> bool:
        if finding.phase not in WATCHED:
            return False
        is_needed = (finding.kind, finding.file, finding.function) in ONCE
        return not is_needed or self.counts[finding] > self.entered[finding.phase]

    def report(self) -> Iterator[str]:
        """Yield a line for every finding, those first that have to be mended."""
        wrong = self.wrong()
        for finding in wrong:
            yield f"WRONG {self.counts[finding]:5d} x in {finding.phase}: {finding}"
        for finding in sorted(set(self.counts) - set(wrong)):
            yield f"      {self.counts[finding]:5d} x in {finding.phase}: {finding}"


def _place() -> tuple[str, int, str, str]:
    """Return file, line and function of the innermost frame that is to blame, and the line of this package above it."""
    frame: FrameType | None = sys._getframe(2)
    place = None
    while frame is not None:
        file, line, function = _short(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name
        if not _is_skipped(frame.f_code.co_filename):
            is_ours = file.startswith("megatron_sse/")
            if place is None:
                if is_ours:
                    return file, line, function, ""
                place = file, line, function
            elif is_ours:
                return *place, f", from {file}:{line} {function}"
        frame = frame.f_back
    return *(place or ("unknown place", 0, "")), ""


def _is_skipped(file: str) -> bool:
    """Check whether a file is never to blame, but what calls it: torch, Python's own library, the rehearsal."""
    if _PACKAGES in file:
        return file.rpartition(_PACKAGES)[2].startswith("torch/")
    return file.startswith((_HERE, _LIBRARY, "<frozen"))


def _short(file: str) -> str:
    if _PACKAGES in file:
        return file.rpartition(_PACKAGES)[2]
    return file.removeprefix(f"{ROOT}/")
