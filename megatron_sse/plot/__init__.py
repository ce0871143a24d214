"""Pictures of runs: curves, loads of the partitions and layouts, as PNG files and one page; `megatron-sse plot`."""
