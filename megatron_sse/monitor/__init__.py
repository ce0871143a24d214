"""Console, TensorBoard and the arithmetic behind speed and utilisation."""

from megatron_sse.monitor.monitor import Monitor

__all__ = ["Monitor"]
