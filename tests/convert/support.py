"""Tiny random models in Hugging Face folders, and comparisons of them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megatron_sse.checkpoint.full_weights import write_weights
from megatron_sse.convert.command import run
from megatron_sse.convert.request import Request
from megatron_sse.hf.name_map import SSE_NAMES, model_links
from megatron_sse.pretrained.open import make_run_config

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# A model of ours.
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "vocab_size": 99,
    "layers": "sse",
    "norm_epsilon": 1e-6,
}
SSE: dict[str, Any] = {"num_heads": 2, "head_dim": 8}
SOFTMAX: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}


def convert(source: str, target: str, **options: Any) -> int:
    """Convert a model as the command does; returns its exit status."""
    return run(Request(source=source, target=target, **options))


def make_dense(folder: Path, model_type: str, **settings: Any) -> Path:
    """Make a random model of a family, in several files, with weights large enough for each to matter."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings))
    network = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in name else 0.2 * drawn)
    network.save_pretrained(folder, max_shard_size="20KB")
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Check that two folders hold bitwise the same tensors under the same names."""
    first, second = read_tensors(folder), read_tensors(other)
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def logits_by_transformers(folder: Path, tokens_BL: torch.Tensor) -> torch.Tensor:
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        return network.eval()(tokens_BL).logits


def random_tokens(vocab_size: int = SIZES["vocab_size"], length: int = 100) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


def model(layers: str = "sse", sse: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    return BASE | {"layers": layers, "sse": SSE | (sse or {})} | others


def make_ours(target: Path, section: dict[str, Any], precision: str = "fp32") -> Path:
    """Make a checkpoint of a random model with weights large enough for each to matter."""
    config = make_run_config(section, 256, precision, "test")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for link in model_links(config.model, SSE_NAMES):
        drawn = torch.randn(link.shape(), generator=generator)
        if "router" in link.ours:
            drawn = 5 * drawn
        tensor = 1 + 0.2 * drawn if "norm" in link.ours else 0.3 * drawn
        tensors[link.ours] = tensor if precision == "fp32" else tensor.bfloat16()
    target.mkdir()
    write_weights(target, config, tensors.items())
    return target
