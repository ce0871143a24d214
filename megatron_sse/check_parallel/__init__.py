"""One training step in several layouts, compared with one process: `megatron-sse check-parallel`."""

from megatron_sse.check_parallel.command import check_parallel

__all__ = ["check_parallel"]
