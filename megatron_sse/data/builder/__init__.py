"""Building token files from text: `megatron-sse data build`."""
