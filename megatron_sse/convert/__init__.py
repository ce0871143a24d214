"""Conversion of models from and to Hugging Face folders, and upcycling; `megatron-sse convert`."""
