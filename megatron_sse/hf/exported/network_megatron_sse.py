"""The layers of a megatron-sse model in plain torch: SSE mixers (arXiv 2507.16577), softmax attention.

Dims: B batch, L tokens of this call, R tokens so far, T tokens of the batch in one row, d hidden, H heads, K and V
channels of keys and values, N partitions, r routers, A = 1 + N banks (the shared bank and the partitions), M = A H.
Parameters are used through their modules alone, so that hooks and adapters on modules see all uses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, rms_norm, scaled_dot_product_attention, silu, softplus

from .recurrences_megatron_sse import gdn, gla, kda
from .tokens_megatron_sse import ShortConvolution, Tokens, hold_gradients, is_finite, make_tokens, spread

# The package's kernels for the recurrences, where it is installed: the same results, faster.
try:
    from megatron_sse.hf.bank_kernels import run_banks
except ImportError:
    run_banks = None  # type: ignore[assignment]

# By recurrence: whether it follows the delta rule, whether every channel has a decay of its own, the default key map.
RECURRENCES = {"gla": (False, True, "softmax"), "gdn": (True, False, "silu"), "kda": (True, True, "silu")}


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def low_rank(hidden: int, rank: int, size: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, size, bias=bias))


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with grouped heads and rotary positions."""

    def __init__(self, hidden: int, settings: dict[str, Any], epsilon: float):
        super().__init__()
        self.settings = settings
        self.head_dim = settings["head_dim"]
        queries, keys = settings["num_heads"] * self.head_dim, settings["num_kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=settings["qkv_bias"])
        self.k_proj = nn.Linear(hidden, keys, bias=settings["qkv_bias"])
        self.v_proj = nn.Linear(hidden, keys, bias=settings["qkv_bias"])
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        if settings["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, epsilon)
            self.k_norm = RMSNorm(self.head_dim, epsilon)

    def forward(self, x_BLd: Tensor, tokens: Tokens, kept: Sequence[Any]) -> tuple[Tensor, tuple]:
        """Return the output, and of the tokens so far keys, values and which are not finite. kept: of earlier calls.

        No value of one document reaches another, not even inf or nan; from such a value on, the outputs of its document
        are nan.
        """
        parts = (self.q_proj(x_BLd), self.k_proj(x_BLd), self.v_proj(x_BLd))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.settings["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.settings["rotary_base"]:
            angles = tokens.position_BL[:, :, None, None] * self._frequencies(x_BLd.device)
            q, k = rotate(q, angles), rotate(k, angles)
        bad = None
        if tokens.starts_BR is not None:
            # A mask does not keep documents apart, since 0 * inf is nan: such tokens are left out.
            bad = torch.stack([~is_finite(part, (2, 3)) for part in (q, k, v)]).any(0)
            q, k, v = (part.masked_fill(bad[..., None, None], 0) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if kept:
            k_before, v_before, bad_before = kept
            if bad is not None:
                if bad_before is None:
                    # Earlier calls had no documents to keep apart.
                    bad_before = ~(is_finite(k_before, (1, 3)) & is_finite(v_before, (1, 3)))
                    k_before, v_before = (x.masked_fill(bad_before[:, None, :, None], 0) for x in (k_before, v_before))
                bad = torch.cat((bad_before, bad), dim=1)
            k, v = torch.cat((k_before, k), dim=2), torch.cat((v_before, v), dim=2)
        mask = tokens.sees(self.settings["window"], q.shape[2])
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        if bad is not None and tokens.starts_BR is not None:
            spoiled_BL = spread(bad, tokens.starts_BR)[:, tokens.num_before :]
            o = o.masked_fill(spoiled_BL[:, None, :, None], torch.nan)
        return self.o_proj(o.transpose(1, 2).flatten(2)), (k, v, bad)

    def _frequencies(self, device: torch.device) -> Tensor:
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        frequencies = self.settings["rotary_base"] ** -exponent
        scaling = self.settings["rotary_scaling"]
        if scaling is None:
            return frequencies
        if scaling["original_length"] is None:
            return frequencies / scaling["factor"]
        turns = scaling["original_length"] / (2 * math.pi) * frequencies
        low, high = scaling["low_turns"], scaling["high_turns"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [..., head dim] by angles [..., head dim / 2]; channel c turns with channel c + head dim / 2."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Router(nn.Linear):
    """The router's scores, in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight.float())


class SSEMixer(nn.Module):
    """Linear attention over one shared state and N sparse ones, of which each token uses a few."""

    def __init__(self, hidden: int, settings: dict[str, Any], epsilon: float, recurrence: str, num_partitions: int):
        super().__init__()
        self.settings, self.num_partitions = settings, num_partitions
        self.delta_rule, self.channel_decay, key_map = RECURRENCES[recurrence]
        self.has_shared = settings["shared_bank"] or not num_partitions
        self.num_kinds = self.has_shared + (num_partitions > 0)
        self.key_map = settings["key_map"] or key_map
        self.maps = "q" if self.key_map == "one_minus_decay" else "qk"
        self.num_heads, self.num_value_heads = settings["num_heads"], settings["num_value_heads"]
        self.group = self.num_value_heads // self.num_heads
        self.key_dim, self.value_dim = settings["head_dim"], settings["value_head_dim"]
        keys, values = self.num_heads * self.key_dim, self.num_value_heads * self.value_dim
        for name in self.maps:
            setattr(self, f"{name}_proj", nn.Linear(hidden, keys, bias=False))
            if num_partitions:
                setattr(self, f"lora_{name}_proj", low_rank(hidden, self.value_dim, keys))
            if settings["short_convolution"]:
                width = settings["short_convolution"]
                setattr(self, f"{name}_conv1d_shared", ShortConvolution(keys, width))
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.o_norm = RMSNorm(self.value_dim, epsilon)
        if settings["output_gate"]:
            self.g_proj = low_rank(hidden, self.value_dim, values)
        if num_partitions:
            # Where reads have a router of their own, its rows come after those for writes.
            self.num_routers = 1 + settings["own_read_router"]
            self.e_proj = Router(hidden, self.num_routers * num_partitions, bias=False)
        if self.delta_rule:
            numbers = self.num_kinds * self.num_value_heads
            if not self.channel_decay:
                self.a_proj = nn.Linear(hidden, numbers, bias=False)
            self.b_proj = nn.Linear(hidden, numbers, bias=False)
            self.A_log = nn.Parameter(torch.zeros(numbers))
            self.dt_bias = nn.Parameter(torch.zeros(numbers, *(self.key_dim,) * self.channel_decay))
        if self.channel_decay and settings["decay"] == "gate":
            rank, size = settings["decay_low_rank"], self.num_value_heads * self.key_dim if self.delta_rule else keys
            gates = (low_rank(hidden, rank, size, bias=not self.delta_rule) for _ in range(self.num_kinds))
            self.gk_proj = nn.ModuleList(gates)

    def forward(self, x_BLd: Tensor, tokens: Tokens, kept: Sequence[Any]) -> tuple[Tensor, tuple]:
        """Return the output, the states [B, M, K, V] and the convolutions' tails. kept: those of earlier calls."""
        state, *tails = kept or (None, None, None)
        qs, ks, tails = self._queries_and_keys(x_BLd, tokens, tails)
        v_BLHV = silu(self.v_proj(x_BLd)).unflatten(-1, (self.num_value_heads, -1))
        gs, betas = self._decays(x_BLd)
        prob = self.e_proj(x_BLd).unflatten(-1, (self.num_routers, -1)).softmax(-1) if self.num_partitions else None
        banks = []
        for q, k, g, beta in zip(qs, ks, gs, betas, strict=True):
            q = q.softmax(-1) if self.settings["query_map"] == "softmax" else silu(q)
            banks.append((q, *self._map_key(k, g), beta))
        if not self.has_shared:
            q, k, *rest = banks[0]
            banks.insert(0, (q, torch.zeros_like(k), *rest))

        attend = self._attend if tokens.flat is None else self._attend_by_kernels
        # Autocast would take products of states in half precision.
        with torch.autocast(x_BLd.device.type, enabled=False):
            o_BLHV, state = attend(banks, v_BLHV, prob, tokens, state)
        o_BLHV = self.o_norm(o_BLHV)
        if self.settings["output_gate"]:
            o_BLHV = o_BLHV * silu(self.g_proj(x_BLd).float().view_as(o_BLHV))
        return self.o_proj(o_BLHV.flatten(2).to(x_BLd.dtype)), (state, *tails)

    def _queries_and_keys(self, x_BLd: Tensor, tokens: Tokens, tails: list) -> tuple[list, list, list]:
        """Return queries and keys [B, L, H, K] by kind of bank, fp32, and the convolutions' new tails."""
        shared, sparse = {}, {}
        new: list[Tensor | None] = [None, None]
        for number, name in enumerate(self.maps):
            plain = getattr(self, f"{name}_proj")(x_BLd)
            shared[name] = plain
            if self.num_partitions:
                # The sparse banks do not see the convolution.
                sparse[name] = plain + getattr(self, f"lora_{name}_proj")(x_BLd)
            if self.settings["short_convolution"]:
                shared[name], new[number] = getattr(self, f"{name}_conv1d_shared")(plain, tails[number], tokens)
        found = []
        for name in "qk":
            of_name = [shared.get(name)] if self.has_shared else []
            of_name += [sparse.get(name)] if self.num_partitions else []
            found.append([x if x is None else x.float().unflatten(-1, (self.num_heads, -1)) for x in of_name])
        return found[0], found[1], new

    def _decays(self, x_BLd: Tensor) -> tuple[list, list]:
        """Return log decays and write strengths of the shared and of the sparse banks."""
        no_beta = [None] * self.num_kinds
        if self.delta_rule:
            rates = self.A_log.float().exp()
            if self.channel_decay:
                logits = [gate(x_BLd).unflatten(-1, (self.num_value_heads, -1)) for gate in self.gk_proj]
                rates = rates[:, None]
            else:
                logits = list(self.a_proj(x_BLd).chunk(self.num_kinds, -1))
            by_kind = zip(logits, rates.chunk(self.num_kinds), self.dt_bias.float().chunk(self.num_kinds), strict=True)
            decays = [-rate * softplus(logit.float() + bias) for logit, rate, bias in by_kind]
            beta = self.b_proj(x_BLd).float().sigmoid() * (2 if self.settings["negative_eigenvalues"] else 1)
            return decays, list(beta.chunk(self.num_kinds, -1))
        if self.settings["decay"] == "gate":
            logits = [gate(x_BLd).float().unflatten(-1, (self.num_heads, -1)) for gate in self.gk_proj]
            return [logsigmoid(logit) / self.settings["decay_normalizer"] for logit in logits], no_beta
        g = torch.zeros(self.num_heads, device=x_BLd.device)
        if self.settings["decay"] == "constant":
            g = torch.log1p(-(2.0 ** (-5 - torch.arange(self.num_heads, device=x_BLd.device, dtype=torch.float32))))
        return [g[:, None].expand(*x_BLd.shape[:2], -1, self.key_dim)] * self.num_kinds, no_beta

    def _map_key(self, k: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
        if k is None:
            return -torch.expm1(g), g
        if self.key_map != "topk_softmax":
            return (silu(k) if self.key_map == "silu" else k.softmax(-1)), g
        # Row-sparse: rows that are not among the largest are neither written nor decayed.
        rows = k.sort(dim=-1, descending=True, stable=True).indices[..., : self.settings["key_topk"]]
        picked = torch.zeros_like(k, dtype=torch.bool).scatter(-1, rows, True)
        return k.masked_fill(~picked, float("-inf")).softmax(-1), g.masked_fill(~picked, 0)

    def _attend(
        self, banks: list, v_BLHV: Tensor, prob_BLrN: Tensor | None, tokens: Tokens, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over banks [B, L, H, V], fp32, and the new states, with all banks side by side and masked.

        banks: query, key, log decay and write strength of the shared and of the sparse ones.
        """
        real_BL = tokens.real_BL()
        writes = (torch.ones(v_BLHV.shape[:2], device=v_BLHV.device) if real_BL is None else real_BL.float())[..., None]
        write_scale, read_scale = writes, torch.ones_like(writes)
        if prob_BLrN is not None:
            picked, write_weight, read_scale_BLN = self._picks(prob_BLrN)
            write_scale = torch.cat((writes, write_weight * writes), dim=-1)
            writes, read_scale = torch.cat((writes, picked * writes), -1), torch.cat((read_scale, read_scale_BLN), -1)
        q, k, g, beta = (self._side_by_side(parts) for parts in zip(*banks, strict=True))
        v = self._side_by_side([v_BLHV.float()] * len(banks))
        # [B, L, A] to [B, L, M, 1]: all heads share a bank's scales.
        num_heads = v_BLHV.shape[2]
        writes, write_scale, read_scale = (
            x.repeat_interleave(num_heads, dim=-1)[..., None] for x in (writes, write_scale, read_scale)
        )
        g = g * (writes if self.channel_decay else writes[..., 0])
        starts_BL = tokens.starts_BL()
        if not self.delta_rule:
            o, state = gla(q, k, v * write_scale, g, state, starts_BL)
        else:
            delta_rule = kda if self.channel_decay else gdn
            if self.settings["gate"] == "reference":
                q, k, read_scale = q * read_scale, k * write_scale, torch.ones_like(read_scale)
                write_scale = writes
            # The weight scales what is written, or how strongly.
            on_beta, on_v = (write_scale, 1) if self.settings["gate"] == "beta" else (writes, write_scale)
            beta = beta * on_beta[..., 0]
            o, state = delta_rule(normalize(q), normalize(k), v * on_v, g, beta, state, starts_BL)
        return (o * read_scale).unflatten(2, (-1, num_heads)).sum(2), state

    def _side_by_side(self, parts: Sequence[Tensor | None]) -> Any:
        """Return the shared bank's tensor, then the sparse banks' one for each partition, [B, L, M, ...].

        Key heads are repeated for the value heads that share them.
        """
        if parts[0] is None:
            return None
        group = self.num_value_heads // parts[0].shape[2]
        heads = [part if group == 1 else part.repeat_interleave(group, dim=2) for part in parts if part is not None]
        return torch.cat([heads[0], *heads[1:] * self.num_partitions], dim=2)

    def _picks(self, prob_BLrN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which partitions a token writes to, and the weights of writes and reads, [B, L, N]."""
        # argsort twice: the rank of each partition among the probabilities, 0 for the largest.
        rank = prob_BLrN.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        weight = prob_BLrN * self.settings["weight_scale"]
        # The last router is the reads'.
        writes = (rank[..., 0, :] < self.settings["num_writers"]).float()
        reads = (rank[..., -1, :] < self.settings["num_readers"]).float()
        write_scale = writes * weight[..., 0, :] if self.settings["weight_writes"] else writes
        read_scale = reads * weight[..., -1, :] if self.settings["weight_reads"] else reads
        return writes, write_scale, read_scale

    def _attend_by_kernels(
        self, banks: list, v_BLHV: Tensor, prob_BLrN: Tensor | None, tokens: Tokens, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Do what _attend does with the package's kernels, which take the tokens of all sequences in one row."""
        flat, real_BL = tokens.flat, tokens.real_BL()
        assert flat is not None
        if real_BL is not None:
            # Padding leaves the states as they are: it writes nothing, and nothing decays.
            padding = ~real_BL[..., None]
            v_BLHV = v_BLHV.masked_fill(padding[..., None], 0)
            banks = [
                (q, k, g.masked_fill(padding.view(*padding.shape[:2], *[1] * (g.dim() - 2)), 0), beta)
                for q, k, g, beta in banks
            ]
            banks = [(*bank, None if beta is None else beta.masked_fill(padding, 0)) for *bank, beta in banks]
        o_THV, final_BAHKV = run_banks(
            [[None if x is None else x.flatten(0, 1) for x in bank] for bank in banks],
            v_BLHV.flatten(0, 1),
            None if prob_BLrN is None else prob_BLrN.flatten(0, 1),
            None if state is None else state.unflatten(1, (-1, self.num_value_heads)),
            *flat,
            self.settings,
        )
        o_BLHV = o_THV.float().view_as(v_BLHV)
        # Of the banks that a sum comes from, some may be finite where others are not.
        return o_BLHV if real_BL is None else hold_gradients(o_BLHV), final_BAHKV.flatten(1, 2)


def normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """A layer: a mixer and an MLP, each behind a norm."""

    def __init__(self, model: dict[str, Any], kind: str):
        super().__init__()
        hidden, epsilon = model["hidden_size"], model["norm_epsilon"]
        self.attn_norm = RMSNorm(hidden, epsilon)
        width = model["input_convolution"]
        self.attn_conv1d = ShortConvolution(hidden, width) if width else None
        if kind == "softmax":
            self.attn: nn.Module = SoftmaxMixer(hidden, model["softmax"], epsilon)
        else:
            sse = model["sse"]
            recurrence, num_partitions = (sse["recurrence"], sse["num_partitions"]) if kind == "sse" else (kind, 0)
            self.attn = SSEMixer(hidden, sse, epsilon, recurrence, num_partitions)
        self.mlp_norm = RMSNorm(hidden, epsilon)
        self.mlp = MLP(hidden, model["ffn_hidden_size"])

    def forward(
        self, x_BLd: Tensor, tokens: Tokens, kept: Sequence[Any] = (), keep: bool = False
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the output and, with `keep`, what later calls need. kept: that of earlier calls."""
        tail, *of_mixer = kept or (None,)
        seen_BLd = self.attn_norm(x_BLd)
        if self.attn_conv1d is not None:
            seen_BLd, tail = self.attn_conv1d(seen_BLd, tail, tokens)
        mixed, of_mixer = self.attn(seen_BLd, tokens, of_mixer)
        x_BLd = x_BLd + mixed
        return x_BLd + self.mlp(self.mlp_norm(x_BLd)), (tail, *of_mixer) if keep else ()


class Network(nn.Module):
    """All but the output projection, without transformers. model: the complete settings."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.embeddings = nn.Embedding(model["vocab_size"], model["hidden_size"])
        self.layers = nn.ModuleList(Block(model, kind) for kind in model["layers"])
        self.norm = RMSNorm(model["hidden_size"], model["norm_epsilon"])

    def forward(self, x_BLd: Tensor) -> Tensor:
        """Return hidden states [B, L, d], given embeddings of the same shape; each sequence is one document."""
        tokens = make_tokens(x_BLd)
        for layer in self.layers:
            x_BLd, _ = layer(x_BLd, tokens)
        return self.norm(x_BLd)
