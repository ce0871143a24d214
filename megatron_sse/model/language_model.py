"""Megatron-Core's language model around our layers: the one file that names GPTModel, and where releases differ."""

import functools
from typing import Any, TypeAlias

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sse.config import ModelConfig
from megatron_sse.model.backend import Backend

# What the rest of the package may use of it: embedding, decoder.layers, decoder.final_layernorm, output_layer,
# pg_collection, forward(), compute_language_model_loss(), shared_embedding_or_output_weight(), sharded_state_dict().
LanguageModel: TypeAlias = GPTModel


def build_language_model(
    model: ModelConfig,
    transformer: TransformerConfig,
    layers: TransformerBlockSubmodules,
    groups: ProcessGroupCollection,
    is_first: bool,
    is_last: bool,
    vp_stage: int | None,
) -> LanguageModel:
    """Build the chunk of a pipeline stage: `layers`, on the first stage the embedding, on the last the output layer."""
    return GPTModel(
        transformer,
        layers,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=0,  # only learned positions would need it
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",  # softmax layers have their own
        pg_collection=groups,
        vp_stage=vp_stage,
    )


def mlp_spec(backend: Backend) -> Any:
    """Return the MLP of a layer, in the form that Megatron-Core's TransformerLayerSubmodules takes."""
    submodules = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)
    # 0.16 takes a ModuleSpec; 0.19 takes a function, and rewraps a ModuleSpec with a warning for every layer.
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)
