"""The needs of a run, from its YAML alone: parameters, memory, operations, bytes, time; `megatron-sse plan`."""
