"""The hand-off: states passed along the slots of a sequence that lie on different ranks."""

from megatron_sse.parallel.handoff.scan import begin_exclusive_scan
from megatron_sse.parallel.handoff.settings import ALGORITHMS, HandOff

__all__ = ["ALGORITHMS", "HandOff", "begin_exclusive_scan"]
