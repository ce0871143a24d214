"""Softmax attention layers of hybrids: Megatron-Core's SelfAttention around a core that knows about documents."""

import copy
import math

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.config.schema import RotaryScaling
from megatron_sse.model.convolution import InputConvolution
from megatron_sse.model.recompute import recomputed
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.routes import reroute
from megatron_sse.parallel.zigzag import ZigzagLayout


class SoftmaxAttention(SelfAttention):
    """Causal self-attention inside documents; rotary positions count from the start of the document.

    Under context parallelism a core attention with `wants_zigzag` gets every document in zigzag over the ranks: the
    hidden states, fewer bytes than what is projected from them, go there and back around the whole module.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        rotary_base: float,
        window: int | None,
        input_convolution: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        rotary_scaling: RotaryScaling | None = None,
        name: str | None = None,
        recompute: bool = False,
    ):
        # The configuration is shared by all layers; Transformer Engine reads the window from it.
        config = copy.copy(config)
        # Megatron counts the tokens before the token itself.
        config.window_size = None if window is None else (window - 1, 0)
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, cp_comm_type, pg_collection)
        self.recompute = recompute
        self.input_convolution = None
        if input_convolution:
            self.input_convolution = InputConvolution(config, input_convolution, layer_number, self.pg_collection)
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, packed_seq_params: TokenLayout, **unused
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output for hidden_states [L, B, d] (a part of L under sequence parallelism), and a bias."""
        return recomputed(self._mix, hidden_states, packed_seq_params, self.recompute and self.training)

    def _mix(self, hidden_states: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        if self.input_convolution is not None:
            hidden_states = self.input_convolution(hidden_states, layout)
        if layout.shard.size == 1 or layout.in_zigzag or not self.core_attention.wants_zigzag:
            return self._attend(hidden_states, layout)
        groups = self.pg_collection
        if self.config.sequence_parallel:
            group, zigzag = groups.tp_cp, layout.to_zigzag(groups.tp.rank(), groups.tp.size())
        else:
            group, zigzag = groups.cp, layout.to_zigzag()
        x_Rc = reroute(hidden_states.flatten(0, 1), zigzag.route, group)
        batch_size = len(zigzag.position_BL)
        out, bias = self._attend(x_Rc.unflatten(0, (-1, batch_size)), zigzag)
        return reroute(out.flatten(0, 1), zigzag.route.back, group).view_as(hidden_states), bias

    def _attend(self, hidden_states: Tensor, layout: TokenLayout | ZigzagLayout) -> tuple[Tensor, Tensor | None]:
        rotary = self._rotary_angles(layout.position_BL) if self.rotary_base else None
        return super().forward(hidden_states, None, rotary_pos_emb=rotary, packed_seq_params=layout)

    def _rotary_angles(self, position_BL: Tensor) -> Tensor:
        """Return angles [L, B, 1, head dim], fp32."""
        frequencies = rotary_frequencies(
            self.hidden_size_per_attention_head, self.rotary_base, self.rotary_scaling, position_BL.device
        )
        # Megatron expects both halves of a head's channels: channel c turns with channel c + head_dim / 2.
        angles = position_BL.t()[:, :, None, None] * frequencies
        return torch.cat((angles, angles), dim=-1)


def rotary_frequencies(
    head_dim: int, base: float, scaling: RotaryScaling | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return radians per token, fp32 [head_dim / 2]."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.original_length is None:
        return frequencies / scaling.factor
    # Llama 3: channels that turn more than high_turns times in the original length keep their frequency, those below
    # low_turns are slowed by the factor, and those between are interpolated.
    turns = scaling.original_length / (2 * math.pi) * frequencies
    kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class TorchAttention(torch.nn.Module):
    """Core attention with torch's scaled_dot_product_attention. Signature of Megatron-Core's core attentions.

    Under context parallelism each rank gathers the keys and values of all; exact for any layout of the tokens.
    """

    wants_zigzag = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.layer_number = layer_number
        # Back from Megatron's count: ours includes the token itself.
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask,
        attn_mask_type,
        attention_bias,
        packed_seq_params,
    ) -> Tensor:
        """Attend within documents.

        query [L, B, heads, head dim], key and value with no more heads; returns [L, B, heads * head dim].
        """
        layout: TokenLayout = packed_seq_params
        return layout.attend(
            self.layer_number,
            query,
            key,
            value,
            window=self.window,
            scale=self.softmax_scale,
            dropout=self.dropout if self.training else 0.0,
            group=self.cp_group,
        )


class DocumentArguments(torch.nn.Module):
    """How Transformer Engine's attention is called: goes in front of the class that is called."""

    wants_zigzag = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask,
        attn_mask_type,
        attention_bias,
        packed_seq_params,
    ) -> Tensor:
        """Attend within documents, with shapes as in TorchAttention.

        packed_seq_params: a TokenLayout or, on context ranks, a ZigzagLayout.
        """
        documents = packed_seq_params.documents
        if documents is None:
            return super().forward(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=None)
        # Packed form: all sequences one after the other, [B * L, heads, head dim], cut by the documents' offsets.
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = super().forward(q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=documents)
        length, batch_size = query.shape[:2]
        return out.view(batch_size, length, -1).transpose(0, 1)


class TEAttention(DocumentArguments, te.TEDotProductAttention if te.HAVE_TE else torch.nn.Module):  # type: ignore[misc]
    """Core attention of Transformer Engine, with its own context parallelism."""
