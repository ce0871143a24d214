"""Monitoring a run: console lines, TensorBoard, profiles, warnings, and the FLOPs behind speed and utilisation."""

from megatron_sse.monitor.monitor import Monitor

__all__ = ["Monitor"]
