"""One training step in several layouts, compared with one process; `megatron-sse check-parallel`."""
