"""The files beside the weights in a Hugging Face folder: config.json, the modeling file, the tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_sse.checkpoint.names import TOKENS
from megatron_sse.config import RunConfig
from megatron_sse.convert.byte_tokenizer import write_byte_tokenizer
from megatron_sse.data.metadata import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_SETTINGS
from megatron_sse.errors import UserError
from megatron_sse.hf import exported
from megatron_sse.hf.dense_settings import FAMILIES, model_to_dense
from megatron_sse.hf.exported.settings_megatron_sse import split_settings
from megatron_sse.hf.folder import CONFIG, read_json, write_json
from megatron_sse.hf.sse_settings import model_to_sse
from megatron_sse.pretrained.logits import network_settings
from megatron_sse.pretrained.open import HF, HF_MODEL_TYPE

# config.json of the folder that a checkpoint was converted from, kept in it for a conversion back.
SOURCE_CONFIG = "hf_config.json"
_KEPT_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
_KEPT_FILES = (
    TOKENIZER,
    TOKENIZER_SETTINGS,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "generation_config.json",
)
# The first is the one that config.json names; it imports the others.
_MODELING_FILES = (
    "modeling_megatron_sse.py",
    "settings_megatron_sse.py",
    "cache_megatron_sse.py",
    "network_megatron_sse.py",
    "tokens_megatron_sse.py",
    "recurrences_megatron_sse.py",
)


def keep_from_source(source: Path, target: Path) -> None:
    """Copy tokenizer and config.json of a Hugging Face folder into a checkpoint of ours. Raises OSError."""
    shutil.copyfile(source / CONFIG, target / SOURCE_CONFIG)
    _copy_tokenizer(source, target)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def hf_settings(config: RunConfig, kind: str) -> dict[str, Any]:
    """Return config.json of a kind of folder. Raises UserError for settings that it cannot hold."""
    model, length = config.model, config.data.sequence_length
    scale = model.transformer.get("softmax_scale")
    if scale is not None and "softmax" in model.layer_kinds():
        raise UserError(f"model.transformer.softmax_scale: got {scale}, allowed null: no Hugging Face layout holds it")
    if kind == HF:
        return _own_settings(config)
    if kind in FAMILIES:
        return model_to_dense(model, kind, length)
    return model_to_sse(model) | {"max_position_embeddings": length}


def _own_settings(config: RunConfig) -> dict[str, Any]:
    module = _MODELING_FILES[0].removesuffix(".py")
    return {
        "architectures": ["MegatronSSEForCausalLM"],
        "model_type": HF_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.MegatronSSEConfig",
            "AutoModel": f"{module}.MegatronSSEModel",
            "AutoModelForCausalLM": f"{module}.MegatronSSEForCausalLM",
        },
        "max_position_embeddings": config.data.sequence_length,
        "use_cache": True,
    } | split_settings(network_settings(config))


def write_beside(source: Path, target: Path, settings: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    """Write config.json and the other files of this kind of folder.

    source: the checkpoint that is converted. dtype: that of most weights. Raises OSError.
    """
    kept: dict[str, Any] = {}
    if (source / SOURCE_CONFIG).is_file():
        before = read_json(source / SOURCE_CONFIG)
        kept = {name: before[name] for name in _KEPT_SETTINGS if name in before}
    _copy_tokenizer(source, target)
    tokens = read_json(source / TOKENS) if (source / TOKENS).is_file() else {}
    if tokens.get("tokenizer") == "bytes":
        kept = write_byte_tokenizer(target)
    elif tokens.get("end") is not None:
        kept["eos_token_id"] = tokens["end"]
    name = str(dtype).removeprefix("torch.")
    write_json(target / CONFIG, settings | kept | {"dtype": name, "torch_dtype": name})
    if kind == HF:
        for file in _MODELING_FILES:
            shutil.copyfile(Path(exported.__file__).with_name(file), target / file)
