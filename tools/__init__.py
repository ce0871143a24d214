"""Thin scripts over the package and benchmarks."""

if __name__ == "tools":
    # Reached from the checkout's folder: a second copy of these modules would have second classes.
    raise ImportError("tools is megatron_sse.tools: use `import megatron_sse.tools`")
