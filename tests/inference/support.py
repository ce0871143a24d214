"""Checkpoints of tiny random models."""

from pathlib import Path
from typing import Any

import torch

from megatron_sse.checkpoint.full_weights import write_weights
from megatron_sse.config import Source
from megatron_sse.hf.name_map import SSE_NAMES, model_links
from megatron_sse.pretrained.open import make_run_config

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "vocab_size": 257,
    "layers": "sse",
}
SSE: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "num_partitions": 3}
SOFTMAX: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}


def model(layers: str = "sse", sse: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """Return the settings of a tiny model."""
    return BASE | {"layers": layers, "sse": SSE | (sse or {})} | others


def make_checkpoint(
    folder: Path, section: dict[str, Any], length: int = 256, precision: str = "fp32", validation: str | None = None
) -> Path:
    """Make a checkpoint of a random model with weights large enough for each to matter."""
    config = make_run_config(section, length, precision, "test")
    config.data.validation = validation and [Source(prefix=validation)]
    generator = torch.Generator("cpu").manual_seed(1)
    tensors = {}
    for link in sorted(model_links(config.model, SSE_NAMES), key=lambda link: link.ours):
        drawn = torch.randn(link.shape(), generator=generator, device="cpu")
        scale = 3.0 if "router" in link.ours else 0.2
        tensor = 1 + 0.2 * drawn if "norm" in link.ours else scale * drawn
        tensors[link.ours] = tensor if precision == "fp32" else tensor.bfloat16()
    folder.mkdir()
    write_weights(folder, config, tensors.items())
    return folder
