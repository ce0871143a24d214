"""The command `megatron-sse score`: a model's logits for given tokens."""
