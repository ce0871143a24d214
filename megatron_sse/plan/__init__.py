"""What a run will need, from its YAML alone: parameters, memory, operations, bytes, time; `megatron-sse plan`."""
