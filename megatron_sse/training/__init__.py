"""The trainer: optimizer, learning-rate schedule, training steps, and the loop of a run."""

from megatron_sse.training.loop import train

__all__ = ["train"]
