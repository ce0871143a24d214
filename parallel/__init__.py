"""Everything that crosses ranks: device, process groups, who holds which tokens."""

if __name__ == "parallel":
    # Reached from the checkout's folder: a second copy of these modules would have second classes.
    raise ImportError("parallel is megatron_sse.parallel: use `import megatron_sse.parallel`")
