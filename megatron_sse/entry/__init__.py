"""The command `megatron-sse train`, which starts the kind of run that the settings describe."""
