"""From our settings to Megatron-Core's TransformerConfig, and the fields of it that `model.transformer` can set."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_sse.config.context import KINDS, attention_kind
from megatron_sse.config.derive import fuses_swiglu, recomputed_parts
from megatron_sse.config.problem import Problem, show
from megatron_sse.config.run import RunConfig

if TYPE_CHECKING:
    import torch

# Fields that our own keys set.
_OURS = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "num_attention_heads": "model.softmax.num_heads",
    "num_query_groups": "model.softmax.num_kv_heads",
    "kv_channels": "model.softmax.head_dim",
    "window_size": "model.softmax.window",
    "qk_layernorm": "model.softmax.qk_norm",
    "add_qkv_bias": "model.softmax.qkv_bias",
    "layernorm_epsilon": "model.norm_epsilon",
    "init_method_std": "model.init_std",
    "embedding_init_method_std": "model.embedding_init_std",
    "linear_conv_kernel_dim": "model.sse.short_convolution",
    "linear_key_head_dim": "model.sse.head_dim",
    "linear_value_head_dim": "model.sse.value_head_dim",
    "linear_num_key_heads": "model.sse.num_heads",
    "linear_num_value_heads": "model.sse.num_value_heads",
    "linear_attention_freq": "model.layers",
    "window_attn_skip_freq": "model.layers",
    "experimental_attention_variant": "model.layers",
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.sequence",
    "context_parallel_size": "parallel.context",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "bf16": "training.precision",
    "params_dtype": "training.precision",
    "pipeline_dtype": "training.precision",
    "autocast_dtype": "training.precision",
    "enable_autocast": "training.precision",
    "cross_entropy_loss_fusion": "training.fused_loss",
    "bias_activation_fusion": "training.fused_swiglu",
    "recompute_granularity": "training.recompute",
    "recompute_method": "training.recompute",
    "recompute_num_layers": "training.recompute",
    "recompute_modules": "training.recompute",
    "distribute_saved_activations": "training.recompute",
}


@dataclass(frozen=True)
class _Field:
    """A field that may be given. allowed: its values in words. accepts: checks one."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_scale(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


# Only fields that were shown to act (tests/model/test_transformer.py, tests/config/test_context.py). Megatron-Core
# accepts many more, without a word, that nothing in this model reads.
FIELDS = {
    "attention_dropout": _Field("a number from 0.0 up to, but not including, 1.0", _is_share),
    "cp_comm_type": _Field(f"{', '.join(KINDS)} or null", lambda value: value is None or value in KINDS),
    "hidden_dropout": _Field("a number from 0.0 up to, but not including, 1.0", _is_share),
    "softmax_scale": _Field("a number above 0.0 or null", _is_scale),
}


def transformer_settings(config: RunConfig, on_gpu: bool = False) -> dict[str, Any]:
    """Return a run's settings as keyword arguments of TransformerConfig; `model.transformer` overrides the others.

    on_gpu: decides settings that are null.
    """
    # Imported late: settings are read, and wrong ones reported, without torch.
    import torch

    model, parallel = config.model, config.parallel
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]
    # A model without softmax layers has no attention heads, but Megatron-Core requires a number.
    num_heads = model.softmax.num_heads or model.sse.num_heads
    interleaved = parallel.virtual_pipeline > 1
    settings = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=num_heads,
        num_query_groups=model.softmax.num_kv_heads or num_heads,
        kv_channels=model.softmax.head_dim or model.sse.head_dim,
        qk_layernorm=model.softmax.qk_norm,
        add_qkv_bias=model.softmax.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        embedding_init_method_std=model.embedding_init_std,
        # The model draws its weights itself, the same in every layout; Megatron-Core only marks how they are split.
        use_cpu_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # On two stages the interleaved schedule mixes up its batched sends and receives: gradients would be wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bias_activation_fusion=fuses_swiglu(config, on_gpu),
        # Older releases of torch needed the host to wait for the GPU after every batch of sends and receives.
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        **_recompute(config),
    )
    # This one is also chosen where it is null.
    return settings | model.transformer | {"cp_comm_type": attention_kind(config)}


def _recompute(config: RunConfig) -> dict[str, Any]:
    """Return what Megatron-Core's layers compute again in the backward pass. Our mixers see to themselves."""
    if config.training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    # Its "layernorm" fails in 0.16 without Transformer Engine.
    if "mlp" in recomputed_parts(config):
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {}


def _leave(weight: torch.Tensor) -> None:
    """Leave the weight as it is."""


def find_transformer_problem(config: RunConfig) -> Problem | None:
    """Return what is wrong with `model.transformer`, or None."""
    for name, value in config.model.transformer.items():
        if name in _OURS:
            text = f"use {_OURS[name]}"
        elif name not in FIELDS:
            nearest = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean model.transformer.{nearest[0]}?" if nearest else ""
            text = f"of the fields of Megatron's TransformerConfig only {', '.join(FIELDS)} have an effect here{hint}"
        elif FIELDS[name].accepts(value):
            continue
        else:
            return Problem(f"model.transformer.{name}", f"got {show(value)}, allowed {FIELDS[name].allowed}")
        return Problem(f"model.transformer.{name}", f"got {show(value)}, allowed nothing: {text}")
    return None
