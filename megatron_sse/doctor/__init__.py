"""What would keep a run from starting, found out before it starts; `megatron-sse doctor`."""

from megatron_sse.doctor.command import examine

__all__ = ["examine"]
