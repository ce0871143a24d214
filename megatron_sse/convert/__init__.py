"""Models of other libraries: into checkpoints of ours and back."""

from megatron_sse.convert.command import convert
from megatron_sse.convert.score import score

__all__ = ["convert", "score"]
