"""The needs of a run, from its YAML alone: parameters, memory, operations, bytes, time; `megatron-sse plan`."""

from megatron_sse.plan.command import plan

__all__ = ["plan"]
