"""The layers of a megatron-sse model in plain torch, for inference: SSE mixers (arXiv 2507.16577), softmax attention.

Dims: B batch, L tokens of this call, R tokens so far, d hidden, H heads, K and V channels of keys and values, N
partitions, U = (1 + N) H (the shared bank and the partitions, by head), C tokens of a chunk, c other channels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, logsigmoid, pad, scaled_dot_product_attention, silu, softplus

GLA_CHUNK, GDN_CHUNK = 16, 64

# By recurrence: whether it follows the delta rule, whether every channel has a decay of its own, the default key map.
RECURRENCES = {"gla": (False, True, "softmax"), "gdn": (True, False, "silu"), "kda": (True, True, "silu")}


class State:
    """What a model keeps of the tokens so far: one entry per layer, their number, and which of them are real."""

    def __init__(self, num_layers: int):
        self.layers: list[tuple[Tensor | None, ...]] = [()] * num_layers
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx` of the batch."""
        self.layers = [tuple(x if x is None else x.index_select(0, beam_idx) for x in layer) for layer in self.layers]


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.float()).to(x.dtype)


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

    def forward(self, x_BLd: Tensor, state: tuple, real_BR: Tensor | None, position_BL: Tensor) -> tuple:
        parts = (self.q_proj(x_BLd), self.k_proj(x_BLd), self.v_proj(x_BLd))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.settings["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.settings["rotary_base"]:
            angles = position_BL[:, :, None, None] * self._frequencies(x_BLd.device)
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if state:
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
        mask = self._mask(q.shape[2], k.shape[2], real_BR, x_BLd.device)
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2)), (k, v)

    def _mask(self, num_queries: int, num_keys: int, real_BR: Tensor | None, device: torch.device) -> Tensor | None:
        """Return which keys a query sees, bool [B or 1, 1, L, R]; None for plain causal attention."""
        window = self.settings["window"]
        if num_queries == num_keys and real_BR is None and window is None:
            return None
        distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        distance = distance - torch.arange(num_keys, device=device)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        seen = seen[None, None]
        # Padding sees itself: a row without keys would give NaN.
        return seen if real_BR is None else seen & (real_BR[:, None, None] | (distance == 0))

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
                setattr(self, f"{name}_conv1d_shared", nn.Conv1d(keys, keys, width, groups=keys, bias=False))
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.o_norm = RMSNorm(self.value_dim, epsilon)
        if settings["output_gate"]:
            self.g_proj = low_rank(hidden, self.value_dim, values)
        if num_partitions:
            # Where reads have a router of their own, its rows come after those for writes.
            self.num_routers = 1 + settings["own_read_router"]
            self.e_proj = nn.Linear(hidden, self.num_routers * num_partitions, bias=False)
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

    def forward(self, x_BLd: Tensor, state: tuple, real_BR: Tensor | None, position_BL: Tensor) -> tuple:
        real_BL = None if real_BR is None else real_BR[:, -x_BLd.shape[1] :]
        recurrent, *tails = state or (None, None, None)
        qs, ks, tails = self._queries_and_keys(x_BLd, real_BL, tails)
        v = silu(self.v_proj(x_BLd)).unflatten(-1, (self.num_value_heads, -1)).float()
        gs, betas = self._decays(x_BLd)

        banks = []
        for kind in range(self.num_kinds):
            q = qs[kind].softmax(-1) if self.settings["query_map"] == "softmax" else silu(qs[kind])
            k, g = self._map_key(ks[kind], gs[kind])
            q, k = (part.repeat_interleave(self.group, dim=-2) for part in (q, k))
            g = g if self.delta_rule else g.repeat_interleave(self.group, dim=-2)
            banks.append((q, k, g, betas[kind], v))
        if not self.has_shared:
            q, k, *rest = banks[0]
            banks.insert(0, (q, torch.zeros_like(k), *rest))
        o, recurrent = self._recur(x_BLd, banks, recurrent, real_BL)

        o = self.o_norm(o)
        if self.settings["output_gate"]:
            o = o * silu(self.g_proj(x_BLd).float().view_as(o))
        return self.o_proj(o.flatten(2).to(x_BLd.dtype)), (recurrent, *tails)

    def _queries_and_keys(self, x_BLd: Tensor, real_BL: Tensor | None, tails: list) -> tuple[list, list, list]:
        """Return queries and keys [B, L, H, K] by kind of bank, and the convolutions' new tails."""
        shared, sparse = {}, {}
        kept: list[Tensor | None] = [None, None]
        for number, name in enumerate(self.maps):
            plain = getattr(self, f"{name}_proj")(x_BLd)
            shared[name] = plain
            if self.num_partitions:
                # The sparse banks do not see the convolution.
                sparse[name] = plain + getattr(self, f"lora_{name}_proj")(x_BLd)
            if self.settings["short_convolution"]:
                convolution = getattr(self, f"{name}_conv1d_shared")
                shared[name], kept[number] = convolve(convolution.weight, plain, real_BL, tails[number])
        found = []
        for name in "qk":
            of_name = [shared.get(name)] if self.has_shared else []
            of_name += [sparse.get(name)] if self.num_partitions else []
            found.append([x if x is None else x.float().unflatten(-1, (self.num_heads, -1)) for x in of_name])
        return found[0], found[1], kept

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

    def _recur(self, x_BLd: Tensor, banks: list, state: Tensor | None, real_BL: Tensor | None) -> tuple:
        """Return outputs [B, L, H, V] and new states [B, U, K, V], all banks side by side and masked."""
        real = torch.ones(x_BLd.shape[:2], device=x_BLd.device) if real_BL is None else real_BL.float()
        writes = write_scale = read_scale = real[:, :, None]
        if self.num_partitions:
            picks = self._picks(x_BLd)
            writes, write_scale, read_scale = (torch.cat((writes, picked * writes), dim=-1) for picked in picks)
        expanded = [self._side_by_side(parts) for parts in zip(*banks, strict=True)]
        writes, write_scale, read_scale = (x[..., None, None] for x in (writes, write_scale, read_scale))
        q, k, g, beta, v = expanded
        g = g * (writes if self.channel_decay else writes[..., 0])
        if not self.delta_rule:
            o, state = gla(q, k, v * write_scale, g, state)
            return (o * read_scale).sum(2), state
        delta_rule = kda if self.channel_decay else gdn
        if self.settings["gate"] == "reference":
            q, k = normalize(q * read_scale), normalize(k * write_scale)
            o, state = delta_rule(q, k, v, g, beta * writes[..., 0], state)
            return o.sum(2), state
        # The weight scales what is written, or how strongly.
        on_beta, on_v = (write_scale, 1) if self.settings["gate"] == "beta" else (writes, write_scale)
        o, state = delta_rule(normalize(q), normalize(k), v * on_v, g, beta * on_beta[..., 0], state)
        return (o * read_scale).sum(2), state

    def _side_by_side(self, parts: tuple) -> Any:
        """Stack the shared bank's tensor, then the sparse banks' one for each partition: a new dim after L."""
        if parts[0] is None:
            return None
        sparse = [parts[1]] * self.num_partitions if self.num_partitions else []
        return torch.stack([parts[0], *sparse], dim=2)

    def _picks(self, x_BLd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which partitions a token writes to, and the weights of writes and reads, [B, L, N]."""
        logits = nn.functional.linear(x_BLd.float(), self.e_proj.weight.float())
        prob = logits.unflatten(-1, (self.num_routers, -1)).softmax(-1)
        # argsort twice: the rank of each partition among the probabilities, 0 for the largest.
        rank = prob.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        weight = prob * self.settings["weight_scale"]
        # The last router is the reads'.
        writes = (rank[..., 0, :] < self.settings["num_writers"]).float()
        reads = (rank[..., -1, :] < self.settings["num_readers"]).float()
        write_scale = writes * weight[..., 0, :] if self.settings["weight_writes"] else writes
        read_scale = reads * weight[..., -1, :] if self.settings["weight_reads"] else reads
        return writes, write_scale, read_scale


def convolve(weight: Tensor, x_BLc: Tensor, real_BL: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolve after the tail, the last tokens of earlier calls; return the result and the new tail."""
    width = weight.shape[-1] - 1
    if real_BL is not None:
        x_BLc = x_BLc * real_BL[..., None]
    x_BLc = pad(x_BLc, (0, 0, width, 0)) if tail is None else torch.cat((tail, x_BLc), dim=1)
    out = conv1d(x_BLc.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)
    return out, x_BLc[:, x_BLc.shape[1] - width :]


def normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S <- diag(exp(g)) S + k^T v, o = q S / sqrt(K), chunk by chunk. Inputs [B, L, banks, H, K or V], fp32."""
    shape = v.shape
    q, k, v, g = (x.flatten(2, 3).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, g))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for q_c, k_c, v_c, g_c in zip(*(x.split(GLA_CHUNK, dim=2) for x in (q, k, v, g)), strict=True):
        total = g_c.cumsum(2)
        # The decay between two rows; -inf for rows that come later, whose exponential may overflow.
        later = torch.ones(q_c.shape[2], q_c.shape[2], dtype=torch.bool, device=q.device).triu(1)[..., None]
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(later, float("-inf")).exp()
        scores = torch.einsum("bmtk,bmsk,bmtsk->bmts", q_c, k_c, between)
        outputs.append((q_c * total.exp()) @ state + scores @ v_c)
        end = total[:, :, -1:]
        state = end.exp().transpose(-1, -2) * state + (k_c * (end - total).exp()).transpose(-1, -2) @ v_c
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(shape), state


def gdn(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S <- exp(g) (I - beta k^T k) S + beta k^T v, o = q S / sqrt(K). As gla(), g and beta [B, L, banks, H]."""
    shape = v.shape
    q, k, v, g, beta = (
        x.flatten(2, 3).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, g[..., None], beta[..., None])
    )
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for q_c, k_c, v_c, g_c, beta_c in zip(*(x.split(GDN_CHUNK, dim=2) for x in (q, k, v, g, beta)), strict=True):
        total = g_c.cumsum(2)
        later = torch.ones(q_c.shape[2], q_c.shape[2], dtype=torch.bool, device=q.device).triu(1)
        between = (total - total.transpose(-1, -2)).masked_fill(later, float("-inf")).exp()
        met = (beta_c * (k_c @ k_c.transpose(-1, -2)) * between).tril(-1)
        wanted = beta_c * (v_c - (k_c * total.exp()) @ state)
        written = torch.linalg.solve_triangular(met, wanted, upper=False, unitriangular=True)
        outputs.append((q_c * total.exp()) @ state + (q_c @ k_c.transpose(-1, -2) * between) @ written)
        end = total[:, :, -1:]
        state = end.exp() * state + (k_c * (end - total).exp()).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(shape), state


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S <- (I - beta k^T k) diag(exp(g)) S + beta k^T v, o = q S / sqrt(K). As gdn(), g [B, L, banks, H, K]."""
    shape = v.shape
    q, k, v, g, beta = (x.flatten(2, 3).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta[..., None]))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for q_c, k_c, v_c, g_c, beta_c in zip(*(x.split(GLA_CHUNK, dim=2) for x in (q, k, v, g, beta)), strict=True):
        total = g_c.cumsum(2)
        later = torch.ones(q_c.shape[2], q_c.shape[2], dtype=torch.bool, device=q.device).triu(1)[..., None]
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(later, float("-inf")).exp()
        met = (beta_c * torch.einsum("bmtk,bmsk,bmtsk->bmts", k_c, k_c, between)).tril(-1)
        wanted = beta_c * (v_c - (k_c * total.exp()) @ state)
        written = torch.linalg.solve_triangular(met, wanted, upper=False, unitriangular=True)
        scores = torch.einsum("bmtk,bmsk,bmtsk->bmts", q_c, k_c, between)
        outputs.append((q_c * total.exp()) @ state + scores @ written)
        end = total[:, :, -1:]
        state = end.exp().transpose(-1, -2) * state + (k_c * (end - total).exp()).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(shape), state


class Block(nn.Module):
    def __init__(self, model: dict[str, Any], kind: str):
        super().__init__()
        hidden, epsilon = model["hidden_size"], model["norm_epsilon"]
        self.attn_norm = RMSNorm(hidden, epsilon)
        width = model["input_convolution"]
        self.attn_conv1d = nn.Conv1d(hidden, hidden, width, groups=hidden, bias=False) if width else None
        if kind == "softmax":
            self.attn: nn.Module = SoftmaxMixer(hidden, model["softmax"], epsilon)
        else:
            sse = model["sse"]
            recurrence, num_partitions = (sse["recurrence"], sse["num_partitions"]) if kind == "sse" else (kind, 0)
            self.attn = SSEMixer(hidden, sse, epsilon, recurrence, num_partitions)
        self.mlp_norm = RMSNorm(hidden, epsilon)
        self.mlp = MLP(hidden, model["ffn_hidden_size"])

    def forward(self, x_BLd: Tensor, state: tuple, real_BR: Tensor | None, position_BL: Tensor) -> tuple:
        tail, *kept = state or (None,)
        seen_BLd = self.attn_norm(x_BLd)
        if self.attn_conv1d is not None:
            real_BL = None if real_BR is None else real_BR[:, -x_BLd.shape[1] :]
            seen_BLd, tail = convolve(self.attn_conv1d.weight, seen_BLd, real_BL, tail)
        mixed, kept = self.attn(seen_BLd, tuple(kept), real_BR, position_BL)
        x_BLd = x_BLd + mixed
        return x_BLd + self.mlp(self.mlp_norm(x_BLd)), (tail, *kept)


class Network(nn.Module):
    """All but the output projection. model: the settings, `layers` with the kind of every layer."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.embeddings = nn.Embedding(model["vocab_size"], model["hidden_size"])
        self.layers = nn.ModuleList(Block(model, kind) for kind in model["layers"])
        self.norm = RMSNorm(model["hidden_size"], model["norm_epsilon"])

    def forward(self, x_BLd: Tensor, real_BR: Tensor | None = None, state: State | None = None) -> Tensor:
        """Return hidden states [B, L, d], given embeddings of the same shape.

        real_BR: bool, for the tokens so far and these: False for padding, which may only be on the left.
        state: of the tokens so far; updated to include these.
        """
        num_before = 0 if state is None else state.num_tokens
        length = x_BLd.shape[1]
        if real_BR is not None and bool(real_BR.all()):
            real_BR = None
        if real_BR is None:
            position_BL = torch.arange(num_before, num_before + length, device=x_BLd.device)[None]
        else:
            position_BL = (real_BR.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        for number, layer in enumerate(self.layers):
            x_BLd, new = layer(x_BLd, () if state is None else state.layers[number], real_BR, position_BL)
            if state is not None:
                state.layers[number] = new
        if state is not None:
            state.num_tokens = num_before + length
        return self.norm(x_BLd)
