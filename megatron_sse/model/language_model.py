"""Megatron-Core's language model around our layers: the one file that names GPTModel, and where releases differ."""

import functools
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.config import ModelConfig
from megatron_sse.model.backend import Backend
from megatron_sse.model.projections import borrow_weight
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.linear_cross_entropy import TokenScores, score_tokens
from megatron_sse.parallel.linear_divergence import Teacher, diverge
from megatron_sse.parallel.output_layer import OutputLayer


class LanguageModel(GPTModel):
    """A pipeline stage's chunk of the model.

    What the rest of the package may use of Megatron-Core's: embedding, decoder.layers, decoder.final_layernorm,
    output_layer, pre_process, post_process, pg_collection, shared_embedding_or_output_weight(), sharded_state_dict().

    output: how the output layer is split and computed; set on the last stage when the model is built.
    """

    output: OutputLayer

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: None = None,
        attention_mask: None = None,
        *,
        packed_seq_params: TokenLayout,
        labels: Tensor | None = None,
        likeliest: bool = False,
        temperature: float = 1.0,
        teacher: Teacher | None = None,
        runtime_gather_output: bool = False,
    ) -> Tensor | TokenScores:
        """Run this stage.

        Args:
            input_ids: int64 [B, L], this context rank's tokens. The next two, which Megatron-Core's models take, are
                not used: packed_seq_params has the positions and documents.
            labels: int64 [B, L], what should follow each token.
            likeliest: also find the likeliest tokens.
            temperature: divides the logits that the scores are of.
            teacher: also find how far this model's distributions are from the teacher's.
            runtime_gather_output: return the logits of all tensor ranks.

        Returns:
            hidden states [L, B, d] on all stages but the last, and there the scores of `labels`, [B, L], or without
            labels this tensor rank's part of the logits, [B, L, v].
        """
        hidden_LBd = self.hidden_states(input_ids, packed_seq_params)
        if not self.post_process:
            return hidden_LBd
        weight_vd = self.output_weight()
        if labels is None:
            logits_LBv, _ = self.output_layer(hidden_LBd, weight=weight_vd, runtime_gather_output=runtime_gather_output)
            return logits_LBv.transpose(0, 1).contiguous()
        divergence_BL = None if teacher is None else diverge(hidden_LBd, weight_vd, teacher, self.output).t()
        scores = score_tokens(hidden_LBd, weight_vd, labels.t(), self.output, likeliest, temperature)
        return TokenScores(scores.loss.t(), None if scores.likeliest is None else scores.likeliest.t(), divergence_BL)

    def hidden_states(self, input_ids: Tensor, layout: TokenLayout) -> Tensor:
        """Return what the next stage, or on the last one the output layer, takes: [L, B, d], under sequence parallelism
        this tensor rank's part of L."""
        hidden_LBd = self.embedding(input_ids, None) if self.pre_process else None
        return self.decoder(hidden_LBd, None, packed_seq_params=layout)

    def output_weight(self) -> Tensor:
        """Return the output layer's weight on this rank: its own, or the embedding that it is tied to."""
        if self.share_embeddings_and_output_weights and self.pre_process:
            # The embedding has been called in this pass.
            return self.shared_embedding_or_output_weight()
        # Also where it is tied to an embedding on another pipeline stage: a copy of that is the layer's own.
        return borrow_weight(self.output_layer)


def build_language_model(
    model: ModelConfig,
    transformer: TransformerConfig,
    layers: TransformerBlockSubmodules,
    groups: ProcessGroupCollection,
    output: OutputLayer,
    is_first: bool,
    is_last: bool,
    vp_stage: int | None,
) -> LanguageModel:
    """Build the chunk of a pipeline stage: `layers`, on the first stage the embedding, on the last the output layer."""
    chunk = LanguageModel(
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
    chunk.output = output
    return chunk


def mlp_spec(backend: Backend) -> Any:
    """Return the MLP of a layer, in the form that Megatron-Core's TransformerLayerSubmodules takes."""
    submodules = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)
    # 0.16 takes a ModuleSpec; 0.19 takes a function, and rewraps a ModuleSpec with a warning for every layer.
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)
