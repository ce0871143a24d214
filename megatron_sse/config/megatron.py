"""`model.transformer`: fields of Megatron-Core's TransformerConfig, checked against that class."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import typing
import warnings
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from megatron_sse.config.context import attention_kind
from megatron_sse.config.derive import fuses_loss, fuses_swiglu
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
# Fields whose value the model and the trainer depend on.
_FIXED = {
    "activation_func",
    "add_bias_linear",
    "batch_p2p_comm",
    "calculate_per_token_loss",
    "gated_linear_unit",
    "gradient_accumulation_fusion",
    "hetereogenous_dist_checkpoint",
    "heterogeneous_block_specs",
    "normalization",
    "overlap_p2p_comm",
    "perform_initialization",
    "test_mode",
    "use_cpu_initialization",
    "variable_seq_lengths",
}
# Features that the model does not have.
_ABSENT = {
    "expert_model_parallel_size",
    "fp16",
    "hybrid_context_parallel",
    "is_hybrid_model",
    "mtp_num_layers",
    "multi_latent_attention",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "num_moe_experts",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
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
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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
        cross_entropy_loss_fusion=fuses_loss(config, on_gpu),
        bias_activation_fusion=fuses_swiglu(config, on_gpu),
        # Older releases of torch needed the host to wait for the GPU after every batch of sends and receives.
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        **(recompute if config.training.recompute == "full" else {}),
    )
    types = _field_types() if model.transformer else {}
    given = {name: _convert(types[name], value) for name, value in model.transformer.items()}
    # This one is also chosen where it is null.
    return settings | given | {"cp_comm_type": attention_kind(config)}


def _leave(weight: torch.Tensor) -> None:
    """Leave the weight as it is."""


def find_transformer_problem(config: RunConfig) -> Problem | None:
    """Return what is wrong with `model.transformer`, or None; Megatron-Core's own checks are included."""
    given = config.model.transformer
    if not given:
        return None
    types = _field_types()
    for name, value in given.items():
        text = _field_problem(name, value, types)
        if text is not None:
            return Problem(f"model.transformer.{name}", text)
    refusal = _megatron_refusal(config)
    return Problem("model.transformer", f"Megatron-Core refuses: {refusal}") if refusal else None


def _field_types() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer import TransformerConfig

    return {f.name: f.type for f in dataclasses.fields(TransformerConfig) if not f.name.startswith("_")}


def _field_problem(name: str, value: Any, types: dict[str, Any]) -> str | None:
    if name not in types:
        nearest = difflib.get_close_matches(name, types, n=1)
        hint = f"; did you mean model.transformer.{nearest[0]}?" if nearest else ""
        return f"got an unknown key, allowed a field of Megatron's TransformerConfig{hint}"
    if name in _OURS:
        return f"got {show(value)}, allowed nothing: use {_OURS[name]}"
    if name in _FIXED:
        return f"got {show(value)}, allowed nothing: the model fixes this field"
    if name in _ABSENT:
        return f"got {show(value)}, allowed nothing: the model does not support it"
    if not _settable(types[name]):
        return f"got {show(value)}, allowed nothing: the field cannot be written in YAML"
    try:
        _convert(types[name], value)
    except ValidationError:
        return f"got {show(value)}, allowed {_type_name(types[name])}"
    return None


def _settable(annotation: Any) -> bool:
    """Check whether a field takes plain values; callables, dtypes and objects can only be set by code."""
    if typing.get_origin(annotation) is typing.Union:
        return any(_settable(part) for part in typing.get_args(annotation) if part is not type(None))
    plain = (bool, int, float, str, list, tuple)
    return annotation in plain or typing.get_origin(annotation) in (typing.Literal, list, tuple) or _is_enum(annotation)


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _convert(annotation: Any, value: Any) -> Any:
    if _is_enum(annotation) and isinstance(value, str) and value in annotation.__members__:
        return annotation[value]
    # Strict, so that an integer field does not take true for 1; not for lists, which YAML has in place of tuples.
    return TypeAdapter(annotation).validate_python(value, strict=not isinstance(value, list))


def _type_name(annotation: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if _is_enum(annotation):
        return ", ".join(annotation.__members__)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Union:
        return " or ".join(_type_name(part) for part in typing.get_args(annotation))
    return str(annotation).replace("typing.", "").lower()


def _megatron_refusal(config: RunConfig) -> str | None:
    """Return TransformerConfig's error for these settings in one line, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.transformer import TransformerConfig

            TransformerConfig(**transformer_settings(config))
    except (ValueError, AssertionError, ImportError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
