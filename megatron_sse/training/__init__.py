"""The trainer: optimizer, schedules, steps, checkpoints, and the run that they make."""

from megatron_sse.training.loop import train

__all__ = ["train"]
