"""Pictures of runs: curves, partition loads and layouts, as PNG files and on one page."""

from megatron_sse.plot.command import plot

__all__ = ["plot"]
