"""The SSE mixer: takes the place of self-attention in Megatron-Core's TransformerLayer (arXiv 2507.16577, section 3).

With N = 0 partitions it is plain gated linear attention or the gated delta rule.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor
from torch.nn.functional import silu

from megatron_sse.config import SSEConfig
from megatron_sse.config.schema import Recurrence
from megatron_sse.kernels import BankInputs, BankOutputs, Edges, Routes, gated_norm, sse_attention
from megatron_sse.model.backend import Backend
from megatron_sse.model.cache import CachedLayout
from megatron_sse.model.convolution import InputConvolution, convolve_slots
from megatron_sse.model.features import constant_decay, delta_decay, gate_decay, map_key, map_query
from megatron_sse.model.metrics import LayerMetrics
from megatron_sse.model.projections import LowRank
from megatron_sse.model.router import AttachLoss, Router
from megatron_sse.parallel.collectives import sum_gradient
from megatron_sse.parallel.handoff import HandOff, exclusive_scan
from megatron_sse.parallel.layout import TokenLayout


class SSEMixer(MegatronModule):
    """Projections, router, banks, output norm and gate. Heads are split over the tensor group.

    The input projection is one matrix with the rows of each key head together (q | k | the group's v, then for the
    delta rule, per value head, the logits of decay and of write strength, shared | sparse), so that every contiguous
    split over the tensor group holds whole heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        settings: SSEConfig,
        recurrence: Recurrence,
        num_partitions: int,
        backend: Backend,
        hand_off: HandOff,
        input_convolution: int,
        cp_comm_type: str | None = None,
    ):
        super().__init__(config)
        self.exchange = partial(exclusive_scan, hand_off=hand_off)
        self.layer_number, self.settings, self.recurrence = layer_number, settings, recurrence
        self.num_partitions = num_partitions
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.has_shared = settings.shared_bank or not num_partitions
        self.num_kinds = self.has_shared + (num_partitions > 0)  # of banks: shared, sparse
        self.key_map = settings.key_map_of(recurrence)
        self.has_keys = self.key_map != "one_minus_decay"
        self.num_heads = settings.num_heads // self.tp_group.size()
        self.group_size = settings.num_value_heads // settings.num_heads
        self.num_value_heads = self.num_heads * self.group_size
        self.key_dim, self.value_dim = settings.head_dim, settings.value_head_dim
        self.metrics = LayerMetrics()

        self.input_convolution = None
        if input_convolution:
            self.input_convolution = InputConvolution(config, input_convolution, layer_number, pg_collection)
        self._build_projections(backend, pg_collection)
        self._build_decay(backend, pg_collection)
        if settings.short_convolution:
            shape = (self.num_heads, 1 + self.has_keys, self.key_dim, settings.short_convolution)
            self.conv_weight = self._split_parameter(torch.empty(shape, dtype=config.params_dtype))
        self.norm_weight = torch.nn.Parameter(torch.ones(self.value_dim, dtype=config.params_dtype))
        self.out_proj = backend.row_parallel_linear(
            settings.num_value_heads * self.value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=pg_collection.tp,
        )

    def _build_projections(self, backend: Backend, pg_collection: ProcessGroupCollection) -> None:
        settings, config, column = self.settings, self.config, backend.column_parallel_linear
        scalars = 2 * self.num_kinds if self.recurrence == "gdn" else 0
        self.head_rows = [self.key_dim, self.key_dim * self.has_keys]
        self.head_rows += [self.group_size * self.value_dim, self.group_size * scalars]
        self.in_proj = column(
            config.hidden_size,
            settings.num_heads * sum(self.head_rows),
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )
        key_size = settings.num_heads * self.key_dim
        if self.num_partitions:
            self.query_lora = LowRank(config, column, self.value_dim, key_size, pg_collection)
            if self.has_keys:
                self.key_lora = LowRank(config, column, self.value_dim, key_size, pg_collection)
            self.router = Router(config, settings, self.num_partitions, pg_collection)
        if settings.output_gate:
            value_size = settings.num_value_heads * self.value_dim
            self.output_gate = LowRank(config, column, self.value_dim, value_size, pg_collection)

    def _build_decay(self, backend: Backend, pg_collection: ProcessGroupCollection) -> None:
        settings, config = self.settings, self.config
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        if self.recurrence == "gdn":
            # fp32 also in bf16 runs: the decays are exponentials of exponentials of these.
            self.A_log = self._split_parameter(torch.empty(self.num_value_heads, self.num_kinds, dtype=dtype))
            self.dt_bias = self._split_parameter(torch.empty(self.num_value_heads, self.num_kinds, dtype=dtype))
        elif settings.decay == "gate":
            column, key_size = backend.column_parallel_linear, settings.num_heads * self.key_dim
            self.decay_gates = torch.nn.ModuleList(
                LowRank(config, column, settings.decay_low_rank, key_size, pg_collection, bias=True)
                for _ in range(self.num_kinds)
            )
        elif settings.decay == "constant":
            decay_H = constant_decay(settings.num_heads).chunk(self.tp_group.size())[self.tp_group.rank()]
            self.register_buffer("constant_decay", decay_H.to(dtype), persistent=False)

    def _split_parameter(self, value: Tensor) -> torch.nn.Parameter:
        """A parameter whose first dim (heads) is split over the tensor group."""
        parameter = torch.nn.Parameter(value)
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, packed_seq_params: TokenLayout, **unused
    ) -> tuple[Tensor, None]:
        """Mix tokens within their documents.

        Args:
            hidden_states: [L, B, d]; under sequence parallelism this rank's part of L.
            packed_seq_params: the micro-batch's documents.

        Returns:
            the output, of the same shape, and no bias.
        """
        layout = packed_seq_params
        if self.input_convolution is not None:
            hidden_states = self.input_convolution(hidden_states, layout)
        shared, sparse, v_THV = self._bank_inputs(hidden_states, layout)
        routes, balance_loss = self.router(hidden_states, layout) if self.num_partitions else (None, None)
        sparse, options = self._weigh(sparse, routes)
        if isinstance(layout, CachedLayout):
            options |= {"exchange": self.exchange, "group": self.cp_group}
            banks = layout.layers[self.layer_number].attend(shared, sparse, v_THV, routes, layout, **options)
        else:
            edges = self._edges(layout)
            banks = sse_attention(
                shared, sparse, v_THV, routes, layout.offsets_D1, layout.document_T, edges=edges, **options
            )
        out = self._project_out(banks, hidden_states, layout)
        if balance_loss is not None and layout.layer_loss_scale is not None:
            scale = (self.settings.balance_loss * layout.layer_loss_scale).to(balance_loss)
            out = AttachLoss.apply(out, balance_loss, scale)
        # Recomputed layers run forward twice: once without gradients, which is not counted.
        if self.training and torch.is_grad_enabled():
            self.metrics.add(shared.g, routes, balance_loss, banks.final_DBHKV)
        return out, None

    def _weigh(self, sparse: BankInputs | None, routes: Routes | None) -> tuple[BankInputs | None, dict[str, Any]]:
        """Where the router's weights act: on the sparse banks' write strengths here, elsewhere as the options say."""
        gate = self.settings.gate if self.recurrence == "gdn" else "post_norm"
        weight_writes = self.settings.weight_writes
        if gate == "beta":
            if weight_writes and sparse is not None and sparse.beta_TH is not None and routes is not None:
                # There is one writer: the first pick.
                sparse = replace(sparse, beta_TH=sparse.beta_TH * routes.weight_TP[:, :1])
            gate, weight_writes = "post_norm", False
        options = {"gate": gate, "weight_writes": weight_writes, "weight_reads": self.settings.weight_reads}
        return sparse, options | {"form": self.settings.form}

    def _bank_inputs(self, hidden_LBd: Tensor, layout: TokenLayout) -> tuple[BankInputs, BankInputs | None, Tensor]:
        """Queries, keys, decays of the shared and of the sparse banks, and the values of both."""
        rows = _flatten(self.in_proj(hidden_LBd)[0]).unflatten(-1, (self.num_heads, -1)).split(self.head_rows, -1)
        q_THK, k_THK, v_THV = rows[0], rows[1] if self.has_keys else None, rows[2]
        v_THV = silu(v_THV.unflatten(-1, (self.group_size, self.value_dim)).flatten(1, 2))
        decays, betas = self._decays(hidden_LBd, rows[3])

        queries, keys = [], []
        if self.has_shared:
            queries, keys = [q_THK], [k_THK]
        if self.num_partitions:
            queries.append(q_THK + self._heads(self.query_lora(hidden_LBd)))
            keys.append(None if k_THK is None else k_THK + self._heads(self.key_lora(hidden_LBd)))
        if self.settings.short_convolution:
            # After the sparse banks' queries and keys are formed: they do not see it, as in the authors' code.
            queries[0], keys[0] = self._convolve(q_THK, k_THK, layout)
        banks = []
        for q, k, g, beta in zip(queries, keys, decays, betas, strict=True):
            k, g = map_key(k, g, self.key_map, self.settings.key_topk)
            banks.append(BankInputs(map_query(q, self.settings.query_map), k, g, beta))
        if not self.has_shared:
            # Nothing is written to it: a comparison for studies, which costs as much as having it.
            banks.insert(0, replace(banks[0], k_THK=torch.zeros_like(banks[0].k_THK)))
        return banks[0], banks[1] if self.num_partitions else None, v_THV

    def _decays(self, hidden_LBd: Tensor, scalars: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Log decays and write strengths by kind of bank; decays [T, H, K], for the delta rule [T, value heads]."""
        if self.recurrence == "gdn":
            scalars = scalars.unflatten(-1, (self.group_size, 2, self.num_kinds)).flatten(1, 2)
            decay = delta_decay(scalars[:, :, 0], self.A_log, self.dt_bias)
            beta = scalars[:, :, 1].to(decay.dtype).sigmoid() * (2 if self.settings.negative_eigenvalues else 1)
            return list(decay.unbind(-1)), list(beta.unbind(-1))
        no_beta: list[Tensor | None] = [None] * self.num_kinds
        if self.settings.decay == "gate":
            logits = [self._heads(gate(hidden_LBd)) for gate in self.decay_gates]
            return [gate_decay(logit, self.settings.decay_normalizer) for logit in logits], no_beta
        num_tokens = scalars.shape[0]
        decay_H = self.constant_decay if self.settings.decay == "constant" else scalars.new_zeros(self.num_heads)
        return [decay_H[:, None].expand(num_tokens, -1, self.key_dim)] * self.num_kinds, no_beta

    def _convolve(self, q_THK: Tensor, k_THK: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        stacked = torch.stack((q_THK,) if k_THK is None else (q_THK, k_THK), dim=2)
        weight_CW = self.conv_weight.flatten(0, 2)
        if isinstance(layout, CachedLayout):
            tail = layout.layers[self.layer_number].tails["banks"]
            out = tail.convolve(stacked.flatten(1), weight_CW, layout, self.cp_group)
        else:
            x_FBLC, position_FBL = (
                x.view(layout.batch_size, layout.shard.num_slots, -1, *x.shape[1:]).transpose(0, 1)
                for x in (stacked.flatten(1), layout.position_BL.flatten())
            )
            out = convolve_slots(x_FBLC, weight_CW, position_FBL, layout.shard.chain, self.cp_group)
            out = out.transpose(0, 1).flatten(0, 2)
        out = out.view_as(stacked)
        return out[:, :, 0], None if k_THK is None else out[:, :, 1]

    def _edges(self, layout: TokenLayout) -> Edges | None:
        """Documents that go on in other slots."""
        edges = layout.edges
        if edges is None:
            return None
        return Edges(edges.entry_FB, edges.continues_FB, edges.exit_FB, edges.carries_FB, self.exchange)

    def _project_out(self, banks: BankOutputs, hidden_LBd: Tensor, layout: TokenLayout) -> Tensor:
        """Sum over banks, per-head RMSNorm, output gate, projection."""
        # Each tensor rank sees its own heads: the gradient of the weight they share is summed here.
        weight_V = sum_gradient(self.norm_weight, self.tp_group)
        gate_THV = None
        if self.settings.output_gate:
            gate_THV = _flatten(self.output_gate(hidden_LBd)).view_as(banks.shared_THV)
        eps = self.config.layernorm_epsilon
        o_THV = gated_norm(banks.shared_THV, banks.picked_TPHV, weight_V, gate_THV, eps)
        o_LBV = o_THV.flatten(1).unflatten(0, (layout.batch_size, layout.length)).transpose(0, 1)
        return self.out_proj(o_LBV.to(hidden_LBd.dtype))[0]

    def _heads(self, x_LBF: Tensor) -> Tensor:
        return _flatten(x_LBF).unflatten(-1, (self.num_heads, -1))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron-Core's checkpoint description: its own parameters of heads are split over the tensor group."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        split = {name: 0 for name in ("A_log", "dt_bias", "conv_weight") if name in own}
        state = make_sharded_tensors_for_checkpoint(
            own, prefix, split, sharded_offsets, tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"]
        )
        return state | self._sharded_children(self, prefix, sharded_offsets, metadata)

    def _sharded_children(
        self, module: torch.nn.Module, prefix: str, sharded_offsets: tuple, metadata: dict | None
    ) -> ShardedStateDict:
        state: ShardedStateDict = {}
        for name, child in module.named_children():
            # Megatron-Core would take all that a low-rank pair or a list holds for replicated.
            holds_modules = not hasattr(child, "sharded_state_dict") and any(child.children())
            describe = self._sharded_children if holds_modules else self._sharded_leaf
            state.update(describe(child, f"{prefix}{name}.", sharded_offsets, metadata))
        return state

    def _sharded_leaf(
        self, module: torch.nn.Module, prefix: str, sharded_offsets: tuple, metadata: dict | None
    ) -> ShardedStateDict:
        return sharded_state_dict_default(module, prefix, sharded_offsets, metadata, self.tp_group)


def _flatten(x_LBF: Tensor) -> Tensor:
    """[L, B, F] to flat tokens [B * L, F]."""
    return x_LBF.transpose(0, 1).flatten(0, 1)
