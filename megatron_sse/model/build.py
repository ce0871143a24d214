"""From the configuration to Megatron-Core models."""

import logging
from dataclasses import replace

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_sse.config import (
    ModelConfig,
    RunConfig,
    choose_hand_off,
    choose_layout,
    choose_loss_chunk,
    fuses_loss,
    recomputed_parts,
    transformer_settings,
)
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.config.weights import model_weights
from megatron_sse.model.attention import SoftmaxAttention, TorchAttention
from megatron_sse.model.backend import Backend, choose_attention, choose_backend
from megatron_sse.model.initialize import bind_weights, initialize_weights
from megatron_sse.model.language_model import LanguageModel, build_language_model, mlp_spec
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.parallel.device import Device
from megatron_sse.parallel.groups import processes_per_node, split_by_node
from megatron_sse.parallel.handoff import HandOff
from megatron_sse.parallel.output_layer import OutputLayer
from megatron_sse.parallel.sharding import ContextShard

logger = logging.getLogger(__name__)


def build_model(
    config: RunConfig,
    groups: ProcessGroupCollection,
    device: Device,
    draw: bool = True,
    core_attention: type[TorchAttention] | None = None,
) -> list[LanguageModel]:
    """Build this rank's model chunks, one per virtual pipeline stage, with weights that depend on the seed alone.

    draw: False leaves the weights unset, for a caller that has others. core_attention: in place of the backend's.
    """
    backend = choose_backend(device)
    warn_of_slow_recurrences(config, device)
    if core_attention is None:
        backend = choose_attention(backend, config, device)
    else:
        backend = replace(backend, core_attention=core_attention)
    hand_off = make_hand_off(config, groups)
    transformer = transformer_config(config, backend, device)
    # Megatron-Core draws nothing, but goes through all weights to mark how tensor ranks split them.
    transformer.perform_initialization = draw or groups.tp.size() > 1
    output = OutputLayer(
        vocab_size=config.model.vocab_size,
        group=groups.tp,
        sequence_parallel=transformer.sequence_parallel,
        chunk=choose_loss_chunk(config),
        fused=fuses_loss(config, device.type == "cuda"),
        accumulate=backend.fuse_gradient_accumulation,
    )
    weights = {weight.name: weight for weight in model_weights(config.model)}
    model_parallel_cuda_manual_seed(config.training.seed)
    num_chunks = config.parallel.virtual_pipeline
    chunks = []
    with torch.device(device.type):
        for stage in range(num_chunks):
            vp_stage = stage if num_chunks > 1 else None
            chunk = _build_chunk(config, transformer, backend, hand_off, output, groups, vp_stage)
            # Transformer Engine's modules take use_cpu_initialization to mean that they are born on the CPU.
            chunk.to(device.type)
            bind_weights(chunk, weights, groups)
            if draw:
                initialize_weights(chunk, groups, config.model, config.training.seed)
            chunks.append(chunk)
    return chunks


def warn_of_slow_recurrences(config: RunConfig, device: Device) -> None:
    """Warn of recurrences that run in torch on a GPU."""
    for recurrence in config.model.recurrences():
        if device.type == "cuda" and not recurrence.has_triton:
            logger.warning("%s layers: torch, slow (this recurrence has no Triton kernels yet)", recurrence.name)


def make_hand_off(config: RunConfig, groups: ProcessGroupCollection) -> HandOff:
    """Return how this run's context ranks pass states along."""
    parallel = config.parallel
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), choose_layout(config)[0])
    wire = {"fp32": None, "bf16": torch.bfloat16}[parallel.hand_off_wire]
    algorithm, ranks_per_node = choose_hand_off(parallel, processes_per_node())
    if parallel.context > 1:
        on_each = f" ({ranks_per_node} on each machine)" if algorithm == "two_level" else ""
        logger.info("hand-off: %s between %d context ranks%s", algorithm, parallel.context, on_each)
    if algorithm != "two_level":
        return HandOff(shard.chain, groups.cp, algorithm, wire)
    node_group, cross_group = split_by_node(groups.cp, ranks_per_node, parallel.timeout_minutes)
    return HandOff(shard.chain, groups.cp, algorithm, wire, node_group, cross_group)


def _build_chunk(
    config: RunConfig,
    transformer: TransformerConfig,
    backend: Backend,
    hand_off: HandOff,
    output: OutputLayer,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
) -> LanguageModel:
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    is_first = pp_rank == 0 and vp_stage in (None, 0)
    # With virtual stages, the model's last layers are in the last chunk of the last rank.
    num_chunks = transformer.virtual_pipeline_model_parallel_size or 1
    is_last = pp_rank == pp_size - 1 and vp_stage in (None, num_chunks - 1)
    first = get_transformer_layer_offset(transformer, vp_stage, pp_rank)
    kinds = config.model.layer_kinds()[first : first + get_num_layers_to_build(transformer, vp_stage, pp_rank)]
    block = TransformerBlockSubmodules(
        layer_specs=[layer_spec(kind, config, backend, hand_off) for kind in kinds], layer_norm=backend.norm
    )
    return build_language_model(config.model, transformer, block, groups, output, is_first, is_last, vp_stage)


def layer_spec(kind: str, config: RunConfig, backend: Backend, hand_off: HandOff) -> ModuleSpec:
    """Return a transformer layer with the mixer of `kind` (pattern.LAYER_KINDS) and a SwiGLU MLP."""
    model = config.model
    mixer = _softmax_spec(model, backend) if kind == "softmax" else _sse_spec(kind, model, backend, hand_off)
    mixer.params["recompute"] = "mixer" in recomputed_parts(config)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=mlp_spec(backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _softmax_spec(model: ModelConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=SoftmaxAttention,
        params={
            "rotary_base": model.softmax.rotary_base,
            "rotary_scaling": model.softmax.rotary_scaling,
            "window": model.softmax.window,
            "input_convolution": model.input_convolution,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_parallel_linear,
            q_layernorm=backend.norm if model.softmax.qk_norm else None,
            k_layernorm=backend.norm if model.softmax.qk_norm else None,
        ),
    )


def _sse_spec(kind: str, model: ModelConfig, backend: Backend, hand_off: HandOff) -> ModuleSpec:
    params = {
        "spec": MixerSpec(model.sse, kind),
        "backend": backend,
        "hand_off": hand_off,
        "input_convolution": model.input_convolution,
    }
    return ModuleSpec(module=SSEMixer, params=params)


def transformer_config(config: RunConfig, backend: Backend, device: Device) -> TransformerConfig:
    """Return Megatron-Core's settings for a run."""
    return TransformerConfig(
        **transformer_settings(config, device.type == "cuda"),
        gradient_accumulation_fusion=backend.fuse_gradient_accumulation,
    )
