"""Logits of a model for given tokens; `megatron-sse score`."""
