"""Models of other libraries: into checkpoints of ours and back."""

from megatron_sse.convert.command import convert

__all__ = ["convert"]
