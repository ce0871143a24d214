"""From text to token files: `megatron-sse data build`."""
