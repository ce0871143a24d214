"""Pictures of runs: curves, loads of the partitions and layouts, as PNG files and one page."""

from megatron_sse.plot.command import plot

__all__ = ["plot"]
