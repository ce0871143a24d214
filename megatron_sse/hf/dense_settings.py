"""config.json of Llama, Qwen2, Qwen3 and Mistral, from and to the settings of a model of softmax layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sse.config import ModelConfig, SoftmaxConfig
from megatron_sse.errors import UserError
from megatron_sse.hf.schema import DenseSchema
from megatron_sse.hf.sse_settings import refuse
from megatron_sse.reading import check

Values = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What a family of models has in its softmax layers.

    defaults: settings that its configuration class fills in where config.json does not have them.
    """

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    window: bool
    defaults: Values


_COMMON: Values = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "sliding_window": None,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", False, False, False, _COMMON),
    "qwen2": Family("Qwen2ForCausalLM", True, False, True, _COMMON | {"num_key_value_heads": 32}),
    "qwen3": Family("Qwen3ForCausalLM", False, True, True, _COMMON | {"num_key_value_heads": 32, "head_dim": 128}),
    "mistral": Family(
        "MistralForCausalLM", False, False, True, _COMMON | {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
}
# What each kind of scaling has, and our names.
_ROPE_SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_turns",
        "high_freq_factor": "high_turns",
    },
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
# Settings that must have these values: our layers support no others.
_ABSENT: Values = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}


def model_from_dense(config: Values, where: str) -> Values:
    """Return the model section for a config.json. Raises UserError, with the key, for what cannot be represented."""
    family = FAMILIES[config["model_type"]]
    given = family.defaults | config
    for key in _REQUIRED:
        if type(given.get(key)) is not int:
            raise UserError(f"{where}: {key}: got {given.get(key)!r}, allowed a number")
    for key, allowed in _ABSENT.items():
        if given.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key}: got {given[key]!r}, allowed {allowed!r}: our layers do not support it")
    check(Path(where), given, DenseSchema)
    head_dim = given["head_dim"] or given["hidden_size"] // given["num_attention_heads"]
    base, scaling = _rotary(given, where)
    dropout = given.get("attention_dropout") or 0.0
    return {
        "num_layers": given["num_hidden_layers"],
        "hidden_size": given["hidden_size"],
        "ffn_hidden_size": given["intermediate_size"],
        "vocab_size": given["vocab_size"],
        "layers": "softmax",
        "norm_epsilon": given["rms_norm_eps"],
        "init_std": given["initializer_range"],
        "tie_embeddings": given["tie_word_embeddings"],
        "softmax": {
            "num_heads": given["num_attention_heads"],
            "head_dim": head_dim,
            "num_kv_heads": given["num_key_value_heads"],
            "window": _window(given, family, where),
            "rotary_base": base,
            "rotary_scaling": scaling,
            "qk_norm": family.qk_norm,
            "qkv_bias": family.qkv_bias,
        },
        "transformer": {"attention_dropout": dropout} if dropout else {},
    }


def _window(given: Values, family: Family, where: str) -> int | None:
    if not family.window:
        return None
    if given["model_type"] == "mistral":
        return given["sliding_window"]
    if not given.get("use_sliding_window"):
        return None
    kinds = given.get("layer_types")
    if kinds is None:
        first = given.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(given["num_hidden_layers"])]
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: layer_types: got a window in some layers, allowed in all or none")
    return given["sliding_window"] if kinds[0] == "sliding_attention" else None


def _rotary(given: Values, where: str) -> tuple[float, Values | None]:
    """Return base and scaling of the rotary embedding, from the keys of transformers 4 or 5."""
    old = {"rope_theta": given.get("rope_theta")} | (given.get("rope_scaling") or {})
    rope = given.get("rope_parameters") or old
    base = float(rope.get("rope_theta") or given.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    names = _ROPE_SCALING.get(kind)
    if names is not None:
        missing = [name for name in names if rope.get(name) is None]
        if missing:
            raise UserError(f"{where}: {missing[0]}: got nothing, allowed a number, since rope_type is {kind!r}")
        return base, {ours: rope[name] for name, ours in names.items()}
    raise UserError(f"{where}: rope_type: got {kind!r}, allowed 'default', 'linear', 'llama3'")


def model_to_dense(model: ModelConfig, model_type: str, length: int) -> Values:
    """Return a family's config.json for a model. Raises UserError, with the key, for settings that it does not have.

    length: tokens of a sequence.
    """
    family, softmax = FAMILIES[model_type], model.softmax
    refuse(_differences(model, family), f"a {model_type} model", "--to hf")
    config = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "num_attention_heads": softmax.num_heads,
        "num_key_value_heads": softmax.num_kv_heads,
        "head_dim": softmax.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.transformer.get("attention_dropout", 0.0),
        "rope_theta": softmax.rotary_base,
        "rope_scaling": _scaling(softmax),
    }
    if model_type in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": softmax.window is not None, "max_window_layers": 0}
    if family.window:
        config["sliding_window"] = softmax.window
    return config


def _scaling(softmax: SoftmaxConfig) -> Values | None:
    scaling = softmax.rotary_scaling
    if scaling is None:
        return None
    if scaling.original_length is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_turns,
        "high_freq_factor": scaling.high_turns,
        "original_max_position_embeddings": scaling.original_length,
    }


def _differences(model: ModelConfig, family: Family) -> list[tuple[str, Any, str]]:
    softmax, kinds = model.softmax, set(model.layer_kinds())
    if kinds != {"softmax"}:
        return [("model.layers", ", ".join(sorted(kinds)), "softmax")]
    found: list[tuple[str, Any, str]] = []
    if model.input_convolution:
        found.append(("model.input_convolution", model.input_convolution, "0"))
    for key in ("qkv_bias", "qk_norm"):
        if getattr(softmax, key) != getattr(family, key):
            found.append((f"model.softmax.{key}", getattr(softmax, key), str(getattr(family, key)).lower()))
    if softmax.window is not None and not family.window:
        found.append(("model.softmax.window", softmax.window, "null"))
    if softmax.rotary_base == 0:
        found.append(("model.softmax.rotary_base", 0.0, "more than 0"))
    return found
