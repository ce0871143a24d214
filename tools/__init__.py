"""Thin scripts over the package, and benchmarks."""

if __name__ == "tools":
    # Imported from the checkout's folder, these modules would be a second copy with classes of their own.
    raise ImportError("tools is megatron_sse.tools: use `import megatron_sse.tools`")
