"""config.json of the SSE authors' code, from and to the settings of our models."""

from pathlib import Path
from typing import Any

from megatron_sse.config import ModelConfig, SoftmaxConfig, SSEConfig
from megatron_sse.config.pattern import shorten_pattern
from megatron_sse.errors import UserError
from megatron_sse.hf.schema import SSESchema
from megatron_sse.reading import check
from megatron_sse.recurrence import RECURRENCES

MODEL_TYPE = "sse"
Values = dict[str, Any]

# Defaults of the authors' configuration class.
_DEFAULTS: Values = {
    "hidden_size": 2048,
    "expand_v": 1.0,
    "use_output_gate": True,
    "use_short_conv": False,
    "allow_neg_eigval": False,
    "conv_size": 4,
    "head_dim": 256,
    "num_heads": 6,
    "num_v_heads": None,
    "num_sparse_partition": 4,
    "num_writer": 2,
    "num_reader": 2,
    "linear_attn_type": "gla",
    "sse_implementation": "varlen",
    "aux_loss_coef": 0.01,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "num_hidden_layers": 24,
    "norm_eps": 1e-6,
    "attn": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "vocab_size": 32000,
}
# Recurrences that the authors' code has.
_RECURRENCES = ("gla", "gdn")
# Settings of ours that the authors' code does not have, and what it does instead: other values cannot be exported.
_FIXED: Values = {
    "weight_writes": True,
    "weight_reads": True,
    "weight_scale": 1.0,
    "own_read_router": False,
    "shared_bank": True,
    "query_map": "silu",
    "decay_low_rank": 16,
    "decay_normalizer": 16.0,
}


def model_from_sse(config: Values, where: str) -> Values:
    """Return the model section of a config.json of the authors' code.

    Raises UserError for what cannot be represented.
    """
    given = _DEFAULTS | config
    check(Path(where), given, SSESchema)
    if given["hidden_act"] != "swish":
        raise UserError(f"{where}: hidden_act: got {given['hidden_act']!r}, allowed 'swish'")
    if given["linear_attn_type"] not in _RECURRENCES:
        allowed = ", ".join(repr(name) for name in _RECURRENCES)
        raise UserError(f"{where}: linear_attn_type: got {given['linear_attn_type']!r}, allowed {allowed}")
    model = {
        "num_layers": given["num_hidden_layers"],
        "hidden_size": given["hidden_size"],
        "ffn_hidden_size": given["intermediate_size"] or _inner_size(given),
        "vocab_size": given["vocab_size"],
        "layers": _layers(given),
        "norm_epsilon": given["norm_eps"],
        "init_std": given["initializer_range"],
        "tie_embeddings": given["tie_word_embeddings"],
        "sse": {
            "recurrence": given["linear_attn_type"],
            "num_heads": given["num_heads"],
            "head_dim": given["head_dim"],
            "value_head_dim": int(given["head_dim"] * given["expand_v"]),
            "num_value_heads": given["num_v_heads"],
            "num_partitions": given["num_sparse_partition"],
            "num_writers": given["num_writer"],
            "num_readers": given["num_reader"],
            "form": given["sse_implementation"],
            # How the authors apply the router's weights in the delta rule.
            "gate": "reference" if RECURRENCES[given["linear_attn_type"]].delta_rule else "post_norm",
            "negative_eigenvalues": given["allow_neg_eigval"],
            "output_gate": given["use_output_gate"],
            "short_convolution": given["conv_size"] if given["use_short_conv"] else 0,
            "balance_loss": given["aux_loss_coef"],
        },
    }
    attention = given["attn"]
    if attention:
        model["softmax"] = {
            "num_heads": attention["num_heads"],
            "num_kv_heads": attention.get("num_kv_heads"),
            "window": attention.get("window_size"),
            "rotary_base": float(attention.get("rope_theta") or 10000.0),
            "qkv_bias": bool(attention.get("qkv_bias", False)),
        }
    return model


def _inner_size(given: Values) -> int:
    size = int(given["hidden_size"] * (given["hidden_ratio"] or 4) * 2 / 3)
    return -(-size // 256) * 256


def _layers(given: Values) -> str:
    softmax = set((given["attn"] or {}).get("layers", ()))
    return shorten_pattern(["softmax" if i in softmax else "sse" for i in range(given["num_hidden_layers"])])


def model_to_sse(model: ModelConfig) -> Values:
    """Return config.json of the authors' code for a model. Raises UserError for what their code does not have."""
    refuse(_differences(model), "the layout of the SSE authors' code", "--to hf")
    sse, kinds = model.sse, model.layer_kinds()
    config = {
        "architectures": ["SSEForCausalLM"],
        "model_type": MODEL_TYPE,
        "attn_mode": "chunk",
        "hidden_size": model.hidden_size,
        "expand_v": sse.value_head_dim / sse.head_dim,
        "use_output_gate": sse.output_gate,
        "use_short_conv": sse.short_convolution > 0,
        "conv_size": sse.short_convolution or 4,
        "allow_neg_eigval": sse.negative_eigenvalues,
        "head_dim": sse.head_dim,
        "num_heads": sse.num_heads,
        "num_v_heads": None if sse.num_value_heads == sse.num_heads else sse.num_value_heads,
        "num_sparse_partition": sse.num_partitions,
        "num_writer": sse.num_writers,
        "num_reader": sse.num_readers,
        "linear_attn_type": sse.recurrence,
        "sse_implementation": sse.form,
        "aux_loss_coef": sse.balance_loss,
        "hidden_ratio": None,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "swish",
        "num_hidden_layers": model.num_layers,
        "norm_eps": model.norm_epsilon,
        "attn": None,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "vocab_size": model.vocab_size,
    }
    if "softmax" in kinds:
        softmax = model.softmax
        config["attn"] = {
            "layers": [number for number, kind in enumerate(kinds) if kind == "softmax"],
            "num_heads": softmax.num_heads,
            "num_kv_heads": softmax.num_kv_heads,
            "qkv_bias": softmax.qkv_bias,
            "window_size": softmax.window,
            "rope_theta": softmax.rotary_base,
        }
    return config


def _differences(model: ModelConfig) -> list[tuple[str, Any, str]]:
    """Return the settings that the authors' code does not have: key, what is given, what it allows."""
    sse: SSEConfig = model.sse
    kinds = set(model.layer_kinds())
    found: list[tuple[str, Any, str]] = []
    if kinds - {"sse", "softmax"} or "sse" not in kinds:
        found.append(("model.layers", ", ".join(sorted(kinds)), "sse, softmax"))
    if model.input_convolution:
        found.append(("model.input_convolution", model.input_convolution, "0"))
    if sse.num_heads is None:
        return found
    found += [(f"model.sse.{key}", getattr(sse, key), str(v)) for key, v in _FIXED.items() if getattr(sse, key) != v]
    if sse.num_partitions <= max(sse.num_writers, sse.num_readers):
        found.append(("model.sse.num_partitions", sse.num_partitions, "more than writers and readers"))
    if sse.form == "varlen" and sse.num_writers != sse.num_readers:
        found.append(("model.sse.num_readers", sse.num_readers, "as many as num_writers with form varlen"))
    recurrence = RECURRENCES[sse.recurrence]
    if recurrence.name not in _RECURRENCES:
        found.append(("model.sse.recurrence", recurrence.name, ", ".join(_RECURRENCES)))
    if recurrence.delta_rule and sse.gate != "reference":
        found.append(("model.sse.gate", sse.gate, "reference"))
    if sse.decay != "gate":
        found.append(("model.sse.decay", sse.decay, "gate"))
    if sse.key_map not in (None, recurrence.key_map):
        found.append(("model.sse.key_map", sse.key_map, "null"))
    if "softmax" in kinds:
        found += _softmax_differences(model.softmax, model.hidden_size)
    return found


def _softmax_differences(softmax: SoftmaxConfig, hidden_size: int) -> list[tuple[str, Any, str]]:
    found: list[tuple[str, Any, str]] = []
    if softmax.head_dim * softmax.num_heads != hidden_size:
        found.append(("model.softmax.head_dim", softmax.head_dim, "model.hidden_size / model.softmax.num_heads"))
    if softmax.qk_norm:
        found.append(("model.softmax.qk_norm", True, "false"))
    if softmax.rotary_base == 0:
        found.append(("model.softmax.rotary_base", 0.0, "more than 0"))
    if softmax.rotary_scaling is not None:
        found.append(("model.softmax.rotary_scaling", "a section", "null"))
    return found


def refuse(found: list[tuple[str, Any, str]], layout: str, instead: str) -> None:
    """Raise UserError for the first setting that a layout cannot hold."""
    for key, given, allowed in found:
        raise UserError(f"{key}: got {given}, allowed in {layout}: {allowed}; use {instead}")
