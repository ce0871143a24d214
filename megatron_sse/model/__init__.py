"""The model: the SSE mixer and softmax attention as Megatron-Core modules, put together from the configuration."""

from megatron_sse.model.build import build_model, transformer_config
from megatron_sse.model.mixer import SSEMixer

__all__ = ["SSEMixer", "build_model", "transformer_config"]
