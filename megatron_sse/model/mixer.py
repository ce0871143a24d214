"""The SSE mixer: takes the place of self-attention in Megatron-Core's TransformerLayer (arXiv 2507.16577, section 3).

With N = 0 partitions it is plain gated linear attention or the gated delta rule.
"""

from collections.abc import Mapping
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

from megatron_sse.config.mixer import MixerSpec
from megatron_sse.config.weights import Weight, mixer_weights
from megatron_sse.kernels import BankInputs, BankOutputs, Routes, gated_norm
from megatron_sse.model.backend import Backend
from megatron_sse.model.convolution import InputConvolution
from megatron_sse.model.features import constant_decay, delta_decay, gate_decay, map_key, map_query
from megatron_sse.model.meanwhile import Meanwhile
from megatron_sse.model.metrics import LayerMetrics
from megatron_sse.model.projections import LowRank, enter_heads, project_down
from megatron_sse.model.recompute import recomputed
from megatron_sse.model.router import AttachLoss, Router
from megatron_sse.parallel.collectives import sum_gradient
from megatron_sse.parallel.handoff import HandOff, begin_exclusive_scan
from megatron_sse.parallel.layout import TokenLayout


class SSEMixer(MegatronModule):
    """Projections, router, banks, output norm and gate. Heads are split over the tensor group.

    The input projection is one matrix with the rows of each key head together (MixerSpec.head_rows), so that every
    contiguous split over the tensor group holds complete heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        spec: MixerSpec,
        backend: Backend,
        hand_off: HandOff,
        input_convolution: int,
        cp_comm_type: str | None = None,
        name: str | None = None,
        recompute: bool = False,
    ):
        super().__init__(config)
        self.exchange = partial(begin_exclusive_scan, hand_off=hand_off)
        self.layer_number, self.spec, self.settings = layer_number, spec, spec.settings
        self.num_partitions = spec.num_partitions
        self.recompute = recompute
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.num_heads = spec.settings.num_heads // self.tp_group.size()
        self.num_value_heads = self.num_heads * spec.group_size
        self.key_dim, self.value_dim = spec.settings.head_dim, spec.settings.value_head_dim
        self.metrics = LayerMetrics()
        self.weights = {weight.name: weight for weight in mixer_weights(spec, config.hidden_size)}

        self.input_convolution = None
        if input_convolution:
            self.input_convolution = InputConvolution(config, input_convolution, layer_number, pg_collection)
        self._build_projections(backend, pg_collection)
        for name in ("A_log", "dt_bias", "conv_weight", "norm_weight"):
            if name in self.weights:
                self.register_parameter(name, self._own_parameter(self.weights[name]))
        if not spec.recurrence.delta_rule and spec.settings.decay == "constant":
            decay_H = constant_decay(spec.settings.num_heads).chunk(self.tp_group.size())[self.tp_group.rank()]
            dtype = torch.promote_types(config.params_dtype, torch.float32)
            self.register_buffer("constant_decay", decay_H.to(dtype), persistent=False)

    def _build_projections(self, backend: Backend, pg_collection: ProcessGroupCollection) -> None:
        config = self.config
        options: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        rows, columns = self.weights["in_proj.weight"].shape
        self.in_proj = backend.column_parallel_linear(
            columns, rows, init_method=config.init_method, gather_output=False, skip_bias_add=False, **options
        )
        rows, columns = self.weights["out_proj.weight"].shape
        self.out_proj = backend.row_parallel_linear(
            columns,
            rows,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **options,
        )

        def low_rank(name: str) -> LowRank:
            (rank, _), (size, _) = (self.weights[f"{name}.{half}.weight"].shape for half in ("down", "up"))
            bias = f"{name}.up.bias" in self.weights
            return LowRank(config, rank, size, pg_collection.tp, bias)

        for name in ("query_lora", "key_lora", "output_gate"):
            if f"{name}.down.weight" in self.weights:
                self.add_module(name, low_rank(name))
        if self.num_partitions:
            self.router = Router(config, self.settings, self.num_partitions, pg_collection)
        if self.spec.has_decay_gates:
            gates = (low_rank(f"decay_gates.{kind}") for kind in range(self.spec.num_bank_kinds))
            self.decay_gates = torch.nn.ModuleList(gates)
        pairs = ((name, module) for name, module in self.named_modules() if isinstance(module, LowRank))
        self.ranks = {name: pair.rank for name, pair in pairs}

    def _own_parameter(self, weight: Weight) -> torch.nn.Parameter:
        """Return a parameter of the mixer itself. Those that are split are split by heads, their first dim."""
        dtype = self.config.params_dtype
        dtype = torch.promote_types(dtype, torch.float32) if weight.fp32 else dtype
        parameter = torch.nn.Parameter(torch.ones(weight.local_shape(self.tp_group.size()), dtype=dtype))
        if weight.split is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=weight.split, stride=1)
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
        return recomputed(self._mix, hidden_states, packed_seq_params, self.recompute and self.training)

    def _mix(self, hidden_states: Tensor, layout: TokenLayout) -> tuple[Tensor, None]:
        if self.input_convolution is not None:
            hidden_states = self.input_convolution(hidden_states, layout)
        low, probabilities = self._alike(hidden_states)
        shared, sparse, v_THV = self._bank_inputs(hidden_states, low, layout)
        routes, balance_loss = (None, None) if probabilities is None else self.router(*probabilities, layout)
        sparse, options = self._weigh(sparse, routes)
        gate = Meanwhile(partial(self._output_gate, low))
        banks = layout.attend_banks(
            self.layer_number,
            shared,
            sparse,
            v_THV,
            routes,
            exchange=gate.during(self.exchange),
            group=self.cp_group,
            **options,
        )
        out = self._project_out(banks, gate.get(), hidden_states, layout)
        if balance_loss is not None and layout.layer_loss_scale is not None:
            scale = (self.settings.balance_loss * layout.layer_loss_scale).to(balance_loss)
            out = AttachLoss.apply(out, balance_loss, scale)
        # Recomputed layers run forward twice: once without gradients, which is not counted.
        if self.training and torch.is_grad_enabled():
            assert banks.final_YAHKV is not None
            self.metrics.add(shared.g, routes, balance_loss, banks.final_YAHKV)
        return out, None

    def _alike(self, hidden_LBd: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Compute what tensor ranks do not split by heads, with one product and one collective for all low-rank pairs.

        Returns:
            what enters the second matrix of each low-rank pair, [T, rank] by the pair's name.
            the router's probabilities of this rank's part of the tokens and of all; None without a router.
        """
        parts = []
        if self.ranks:
            parts.append(project_down((self.get_submodule(name) for name in self.ranks), hidden_LBd))
        if self.num_partitions:
            parts.append(self.router.probabilities(hidden_LBd))
        whole = enter_heads(parts, self.tp_group, self.config.sequence_parallel)
        probabilities = (parts[-1], whole[-1]) if self.num_partitions else None
        if not self.ranks:
            return {}, probabilities
        columns = _flatten(whole[0]).split(list(self.ranks.values()), -1)
        return dict(zip(self.ranks, columns, strict=True)), probabilities

    def _weigh(self, sparse: BankInputs | None, routes: Routes | None) -> tuple[BankInputs | None, dict[str, Any]]:
        """Apply the router's weights where they act on the sparse banks' write strengths; the options say the rest."""
        gate = self.settings.gate if self.spec.recurrence.delta_rule else "post_norm"
        weight_writes = self.settings.weight_writes
        if gate == "beta":
            if weight_writes and sparse is not None and sparse.beta_TH is not None and routes is not None:
                # There is one writer: the first pick.
                sparse = replace(sparse, beta_TH=sparse.beta_TH * routes.weight_TP[:, :1])
            gate, weight_writes = "post_norm", False
        options = {"gate": gate, "weight_writes": weight_writes, "weight_reads": self.settings.weight_reads}
        return sparse, options | {"form": self.settings.form}

    def _bank_inputs(
        self, hidden_LBd: Tensor, low: Mapping[str, Tensor], layout: TokenLayout
    ) -> tuple[BankInputs, BankInputs | None, Tensor]:
        """Return queries, keys, decays of the shared and of the sparse banks, and the values of both.

        low: what enters the second matrices of low-rank pairs, as `_alike` returns it.
        """
        head_rows = self.spec.head_rows
        parts = _flatten(self.in_proj(hidden_LBd)[0]).unflatten(-1, (self.num_heads, -1))
        rows = dict(zip(head_rows, parts.split(list(head_rows.values()), -1), strict=True))
        q_THK, k_THK = rows["q"], rows.get("k")
        v_THV = silu(rows["v"].unflatten(-1, (self.spec.group_size, self.value_dim)).flatten(1, 2))
        decays, betas = self._decays(low, rows["scalars"])

        queries, keys = [], []
        if self.spec.has_shared:
            queries, keys = [q_THK], [k_THK]
        if self.num_partitions:
            queries.append(q_THK + self._heads(self.query_lora(low["query_lora"])))
            keys.append(None if k_THK is None else k_THK + self._heads(self.key_lora(low["key_lora"])))
        if self.settings.short_convolution:
            # After the sparse banks' queries and keys are formed: they do not see it, as in the authors' code.
            queries[0], keys[0] = self._convolve(q_THK, k_THK, layout)
        banks = []
        for q, k, g, beta in zip(queries, keys, decays, betas, strict=True):
            k, g = map_key(k, g, self.spec.key_map, self.settings.key_topk)
            banks.append(BankInputs(map_query(q, self.settings.query_map), k, g, beta))
        if not self.spec.has_shared:
            # Nothing is written to it: a comparison for studies, which costs as much as having it.
            banks.insert(0, replace(banks[0], k_THK=torch.zeros_like(banks[0].k_THK)))
        return banks[0], banks[1] if self.num_partitions else None, v_THV

    def _decays(self, low: Mapping[str, Tensor], scalars: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return log decays and write strengths, by kind of bank, as BankInputs takes them.

        scalars: the input projection's, [T, H, group x scalars x kinds of banks].
        """
        recurrence, kinds = self.spec.recurrence, self.spec.num_bank_kinds
        if recurrence.delta_rule:
            return self._delta_rule_decays(low, scalars)
        no_beta: list[Tensor | None] = [None] * kinds
        if self.spec.has_decay_gates:
            logits = [self._heads(logit) for logit in self._gate_logits(low)]
            return [gate_decay(logit, self.settings.decay_normalizer) for logit in logits], no_beta
        num_tokens = scalars.shape[0]
        if self.settings.decay == "constant":
            decay_H = self.constant_decay
        else:
            assert self.settings.decay == "none"
            decay_H = scalars.new_zeros(self.num_heads)
        return [decay_H[:, None].expand(num_tokens, -1, self.key_dim)] * kinds, no_beta

    def _gate_logits(self, low: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the gates of decays yield, [T, channels] by kind of bank."""
        return [gate(low[f"decay_gates.{kind}"]) for kind, gate in enumerate(self.decay_gates)]

    def _delta_rule_decays(
        self, low: Mapping[str, Tensor], scalars: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        recurrence, kinds = self.spec.recurrence, self.spec.num_bank_kinds
        # [T, value heads, kinds] by scalar.
        # Of a key head, the columns are value head by value head, each scalar by scalar, each shared | sparse.
        by_scalar = scalars.unflatten(-1, (self.spec.group_size, -1, kinds)).flatten(1, 2).unbind(2)
        named = dict(zip(recurrence.scalars, by_scalar, strict=True))
        rates, biases = self.A_log.unbind(1), self.dt_bias.unbind(1)
        if recurrence.channel_decay:
            logits = [logit.unflatten(-1, (-1, self.key_dim)) for logit in self._gate_logits(low)]
            # One rate for each head, one bias for each channel.
            rates = tuple(rate[:, None] for rate in rates)
        else:
            logits = list(named["decay"].unbind(-1))
        decays = [delta_decay(*parts) for parts in zip(logits, rates, biases, strict=True)]
        beta = named["beta"].to(self.A_log.dtype).sigmoid() * (2 if self.settings.negative_eigenvalues else 1)
        return decays, list(beta.unbind(-1))

    def _convolve(self, q_THK: Tensor, k_THK: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        # One convolution for both: channels are (head, q or k, channel), the order of conv_weight.
        stacked = torch.stack((q_THK,) if k_THK is None else (q_THK, k_THK), dim=2)
        x_LBc = stacked.flatten(1).unflatten(0, (layout.batch_size, layout.length)).transpose(0, 1)
        out_LBc = layout.convolve(self.layer_number, "banks", x_LBc, self.conv_weight.flatten(0, 2), self.cp_group)
        out = _flatten(out_LBc).view_as(stacked)
        return out[:, :, 0], None if k_THK is None else out[:, :, 1]

    def _output_gate(self, low: Mapping[str, Tensor]) -> Tensor | None:
        """Return the logits of the output gate [T, value heads, V]; None where there is no gate."""
        if not self.settings.output_gate:
            return None
        return self.output_gate(low["output_gate"]).unflatten(-1, (self.num_value_heads, self.value_dim))

    def _project_out(
        self, banks: BankOutputs, gate_THV: Tensor | None, hidden_LBd: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Sum over banks, per-head RMSNorm, output gate, projection."""
        # Each tensor rank sees its own heads: the gradient of the weight they share is summed here.
        weight_V = sum_gradient(self.norm_weight, self.tp_group)
        eps = self.config.layernorm_epsilon
        o_THV = gated_norm(banks.shared_THV, banks.picked_TPHV, weight_V, gate_THV, eps)
        o_LBc = o_THV.flatten(1).unflatten(0, (layout.batch_size, layout.length)).transpose(0, 1)
        return self.out_proj(o_LBc.to(hidden_LBd.dtype))[0]

    def _heads(self, x_Tc: Tensor) -> Tensor:
        """Split channels into key heads."""
        return x_Tc.unflatten(-1, (self.num_heads, -1))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the parameters to Megatron-Core's checkpoints; the mixer's own are split by heads."""
        # Only the mixer's own parameters: the children describe theirs.
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        split = {name: dim for name in own if (dim := self.weights[name].split) is not None}
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


def _flatten(x_LBc: Tensor) -> Tensor:
    """Turn [L, B, c] into flat tokens [B * L, c]."""
    return x_LBc.transpose(0, 1).flatten(0, 1)
