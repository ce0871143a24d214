"""The layouts of Hugging Face folders: every tensor of a model of ours and what it is made of there.

Two sets of names: that of the SSE authors' code (pull request 882 of fla-org/flash-linear-attention), and that of
Llama, Qwen2, Qwen3 and Mistral.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.config import ModelConfig, SoftmaxConfig, SSEConfig
from megatron_sse.config.schema import Recurrence
from megatron_sse.hf.links import Link, Part, by_head, padded, same, stacked


@dataclass(frozen=True)
class Names:
    """What differs between the two sets of names."""

    embedding: str
    attention: str
    attention_norm: str
    mlp_norm: str


SSE_NAMES = Names("model.embeddings.weight", "attn", "attn_norm", "mlp_norm")
DENSE_NAMES = Names("model.embed_tokens.weight", "self_attn", "input_layernorm", "post_attention_layernorm")


def model_links(model: ModelConfig, names: Names) -> list[Link]:
    """All tensors of a model."""
    vocabulary = (model.vocab_size, model.hidden_size)
    links = [
        padded("embedding.word_embeddings.weight", Part(names.embedding, vocabulary), model.padded_vocab_size),
        same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size),
    ]
    for number, kind in enumerate(model.layer_kinds()):
        links += layer_links(model, names, number, kind)
    if not model.tie_embeddings:
        links.append(padded("output_layer.weight", Part("lm_head.weight", vocabulary), model.padded_vocab_size))
    return links


def layer_links(model: ModelConfig, names: Names, number: int, kind: str) -> Iterator[Link]:
    """Tensors of one layer."""
    ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    yield same(f"{ours}input_layernorm.weight", f"{theirs}{names.attention_norm}.weight", hidden)
    if model.input_convolution:
        part = Part(f"{theirs}{names.attention}_conv1d.weight", (hidden, 1, model.input_convolution))
        name = f"{ours}self_attention.input_convolution.conv_weight"
        yield Link(name, (part,), lambda tensor: tensor.squeeze(1), lambda tensor: [tensor.unsqueeze(1)])
    mixer = (f"{ours}self_attention.", f"{theirs}{names.attention}.")
    if kind == "softmax":
        yield from softmax_links(model.softmax, hidden, *mixer)
    else:
        recurrence: Recurrence = model.sse.recurrence if kind == "sse" else "gdn" if kind == "gdn" else "gla"
        num_partitions = model.sse.num_partitions if kind == "sse" else 0
        yield from mixer_links(model.sse, hidden, recurrence, num_partitions, *mixer)
    yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}{names.mlp_norm}.weight", hidden)
    gate, up = (Part(f"{theirs}mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
    yield stacked(f"{ours}mlp.linear_fc1.weight", gate, up)
    yield same(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", hidden, inner)


def softmax_links(settings: SoftmaxConfig, hidden: int, ours: str, theirs: str) -> Iterator[Link]:
    """Tensors of a softmax mixer. ours, theirs: prefixes."""
    queries, keys = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    sizes = {"q": queries, "k": keys, "v": keys}
    # Megatron keeps the rows of each key head together, with those of its query heads.
    weights = [Part(f"{theirs}{name}_proj.weight", (size, hidden)) for name, size in sizes.items()]
    yield by_head(f"{ours}linear_qkv.weight", settings.num_kv_heads, *weights)
    if settings.qkv_bias:
        biases = [Part(f"{theirs}{name}_proj.bias", (size,)) for name, size in sizes.items()]
        yield by_head(f"{ours}linear_qkv.bias", settings.num_kv_heads, *biases)
    yield same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", hidden, queries)
    if settings.qk_norm:
        for name in "qk":
            yield same(f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight", settings.head_dim)


def mixer_links(
    settings: SSEConfig, hidden: int, recurrence: Recurrence, num_partitions: int, ours: str = "", theirs: str = ""
) -> Iterator[Link]:
    """Tensors of an SSE mixer. ours, theirs: prefixes."""
    keys = settings.num_heads * settings.head_dim
    values = settings.num_value_heads * settings.value_head_dim
    maps = "qk" if settings.key_map_of(recurrence) != "one_minus_decay" else "q"
    kinds = 2 if num_partitions and settings.shared_bank else 1

    yield _in_proj(settings, hidden, recurrence, maps, kinds, ours, theirs)
    yield same(f"{ours}out_proj.weight", f"{theirs}o_proj.weight", hidden, values)
    yield same(f"{ours}norm_weight", f"{theirs}o_norm.weight", settings.value_head_dim)
    if settings.output_gate:
        yield from _low_rank(f"{ours}output_gate", f"{theirs}g_proj", hidden, settings.value_head_dim, values)
    if num_partitions:
        rows = settings.num_routers * num_partitions
        yield same(f"{ours}router.proj.weight", f"{theirs}e_proj.weight", rows, hidden)
        for name, part in zip(("query_lora", "key_lora"), maps, strict=False):
            yield from _low_rank(f"{ours}{name}", f"{theirs}lora_{part}_proj", hidden, settings.value_head_dim, keys)
    if recurrence == "gdn":
        yield from (_by_kind(f"{ours}{name}", f"{theirs}{name}", kinds, settings) for name in ("A_log", "dt_bias"))
    elif settings.decay == "gate":
        rank = settings.decay_low_rank
        for kind in range(kinds):
            yield from _low_rank(f"{ours}decay_gates.{kind}", f"{theirs}gk_proj.{kind}", hidden, rank, keys)
            yield same(f"{ours}decay_gates.{kind}.up.bias", f"{theirs}gk_proj.{kind}.1.bias", keys)
    if settings.short_convolution:
        yield _convolution(settings, maps, ours, theirs)


def _in_proj(settings: SSEConfig, hidden: int, recurrence: str, maps: str, kinds: int, ours: str, theirs: str) -> Link:
    keys = settings.num_heads * settings.head_dim
    values = settings.num_value_heads * settings.value_head_dim
    rows = [(name, keys) for name in maps] + [("v", values)]
    heads = by_head(
        f"{ours}in_proj.weight",
        settings.num_heads,
        *(Part(f"{theirs}{name}_proj.weight", (size, hidden)) for name, size in rows),
    )
    if recurrence != "gdn":
        return heads
    # Theirs: [all shared heads | all sparse heads]. Ours: per value head decay and write strength, shared | sparse.
    num_heads, group = settings.num_heads, settings.num_value_heads // settings.num_heads
    scalars = tuple(Part(f"{theirs}{name}_proj.weight", (kinds * num_heads * group, hidden)) for name in "ab")

    def join(*tensors: Tensor) -> Tensor:
        by_kind = torch.stack(tensors[-2:]).unflatten(1, (kinds, num_heads, group))
        own = by_kind.permute(2, 3, 0, 1, 4).flatten(1, 3)
        return torch.cat((heads.join(*tensors[:-2]).unflatten(0, (num_heads, -1)), own), dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        per_head = tensor.unflatten(0, (num_heads, -1))
        own = per_head[:, -2 * kinds * group :].unflatten(1, (group, 2, kinds)).permute(2, 3, 0, 1, 4)
        projections = heads.split(per_head[:, : -2 * kinds * group].flatten(0, 1))
        return [*projections, *own.flatten(1, 3).unbind()]

    return Link(heads.ours, heads.theirs + scalars, join, split)


def _low_rank(ours: str, theirs: str, hidden: int, rank: int, size: int) -> Iterator[Link]:
    yield same(f"{ours}.down.weight", f"{theirs}.0.weight", rank, hidden)
    yield same(f"{ours}.up.weight", f"{theirs}.1.weight", size, rank)


def _by_kind(ours: str, theirs: str, kinds: int, settings: SSEConfig) -> Link:
    """A number per value head and kind of bank; theirs all shared ones first."""
    part = Part(theirs, (kinds * settings.num_value_heads,))
    return Link(
        ours, (part,), lambda tensor: tensor.unflatten(0, (kinds, -1)).t(), lambda tensor: [tensor.t().flatten()]
    )


def _convolution(settings: SSEConfig, maps: str, ours: str, theirs: str) -> Link:
    channels, width = settings.num_heads * settings.head_dim, settings.short_convolution
    parts = tuple(Part(f"{theirs}{name}_conv1d_shared.weight", (channels, 1, width)) for name in maps)

    def join(*tensors: Tensor) -> Tensor:
        return torch.stack([tensor.squeeze(1).unflatten(0, (settings.num_heads, -1)) for tensor in tensors], dim=1)

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1).unsqueeze(1) for part in tensor.unbind(1)]

    return Link(f"{ours}conv_weight", parts, join, split)
