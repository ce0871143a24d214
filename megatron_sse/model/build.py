"""From the configuration to Megatron-Core models."""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_sse.config import ModelConfig, RunConfig
from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.model.backend import Backend, choose_backend
from megatron_sse.model.initialize import initialize_weights
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.parallel.device import Device


def build_model(config: RunConfig, groups: ProcessGroupCollection, device: Device) -> list[GPTModel]:
    """This rank's model chunks, one per virtual pipeline stage, with weights that depend on the seed alone."""
    backend = choose_backend(device)
    transformer = transformer_config(config, backend)
    model_parallel_cuda_manual_seed(config.training.seed)
    num_chunks = config.parallel.virtual_pipeline
    chunks = []
    with torch.device(device.type):
        for stage in range(num_chunks):
            chunk = _build_chunk(config.model, transformer, backend, groups, stage if num_chunks > 1 else None)
            initialize_weights(chunk, groups, config.training.seed)
            chunks.append(chunk)
    return chunks


def _build_chunk(
    model: ModelConfig,
    transformer: TransformerConfig,
    backend: Backend,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
) -> GPTModel:
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    is_first = pp_rank == 0 and vp_stage in (None, 0)
    num_chunks = transformer.virtual_pipeline_model_parallel_size or 1
    is_last = pp_rank == pp_size - 1 and vp_stage in (None, num_chunks - 1)
    first = get_transformer_layer_offset(transformer, vp_stage, pp_rank)
    kinds = model.layer_kinds()[first : first + get_num_layers_to_build(transformer, vp_stage, pp_rank)]
    block = TransformerBlockSubmodules(
        layer_specs=[layer_spec(kind, model, backend) for kind in kinds], layer_norm=backend.norm
    )
    chunk = GPTModel(
        transformer,
        block,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=0,  # only learned positions would need it
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",  # softmax layers have their own
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    return chunk


def layer_spec(kind: str, model: ModelConfig, backend: Backend) -> ModuleSpec:
    """A transformer layer with the mixer of `kind` (sse, gla, gdn, softmax) and a SwiGLU MLP."""
    mlp = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=_softmax_spec(model, backend) if kind == "softmax" else _sse_spec(kind, model, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _softmax_spec(model: ModelConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=SoftmaxAttention,
        params={"rotary_base": model.softmax.rotary_base, "window": model.softmax.window},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_parallel_linear,
            q_layernorm=backend.norm if model.softmax.qk_norm else None,
            k_layernorm=backend.norm if model.softmax.qk_norm else None,
        ),
    )


def _sse_spec(kind: str, model: ModelConfig, backend: Backend) -> ModuleSpec:
    params = {
        "settings": model.sse,
        "recurrence": model.sse.recurrence if kind == "sse" else kind,
        "num_partitions": model.sse.num_partitions if kind == "sse" else 0,
        "backend": backend,
    }
    return ModuleSpec(module=SSEMixer, params=params)


def transformer_config(config: RunConfig, backend: Backend) -> TransformerConfig:
    """Megatron-Core's settings for a run."""
    model, parallel = config.model, config.parallel
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]
    # A model without softmax layers has no attention heads of its own; Megatron-Core wants a number.
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
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        # Weights are drawn in initialize.py, the same in every layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # On two stages the interleaved schedule mixes up its batched sends and receives (gradients come out wrong).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=backend.fuse_gradient_accumulation,
        hetereogenous_dist_checkpoint=True,
        **(recompute if config.training.recompute == "full" else {}),
    )
    return TransformerConfig(**{**settings, **model.transformer})
