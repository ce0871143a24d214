"""Pictures of runs: curves, partition loads and layouts, as PNG files and on one page; `megatron-sse plot`."""
