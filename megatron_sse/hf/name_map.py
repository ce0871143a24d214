"""Which tensors of a Hugging Face folder each tensor of our models corresponds to.

There are two sets of names: that of the SSE authors' code (pull request 882 of fla-org/flash-linear-attention), and
that of Llama, Qwen2, Qwen3 and Mistral.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sse.config import ModelConfig, SoftmaxConfig
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.config.weights import (
    Weight,
    embedding_weight,
    final_norm_weight,
    layer_weights,
    mixer_weights,
    output_weight,
)
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
# In all folders; none where it is tied to the embedding.
OUTPUT = "lm_head.weight"

# By our names in an SSE mixer. The halves of a low-rank pair are numbered 0 and 1 there.
_MIXER_NAMES = {"out_proj.weight": "o_proj.weight", "router.proj.weight": "e_proj.weight"}
_MIXER_NAMES |= {"norm_weight": "o_norm.weight"}
_LOW_RANK_NAMES = {"output_gate": "g_proj", "query_lora": "lora_q_proj", "key_lora": "lora_k_proj"}
_HALVES = {".down.weight": ".0.weight", ".up.weight": ".1.weight", ".up.bias": ".1.bias"}
_SCALARS = {"decay": "a", "beta": "b"}


def model_links(model: ModelConfig, names: Names) -> list[Link]:
    """Return the links of all tensors of a model."""
    vocabulary = (model.vocab_size, model.hidden_size)
    embedding, output, norm = embedding_weight(model), output_weight(model), final_norm_weight(model)
    links = [
        padded(embedding.name, Part(names.embedding, vocabulary), model.padded_vocab_size),
        same(norm.name, "model.norm.weight", *norm.shape),
    ]
    for number, kind in enumerate(model.layer_kinds()):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        links += [_layer_link(model, names, kind, weight, ours, theirs) for weight in layer_weights(model, kind)]
    if not model.tie_embeddings:
        links.append(padded(output.name, Part(OUTPUT, vocabulary), model.padded_vocab_size))
    return links


def _layer_link(model: ModelConfig, names: Names, kind: str, weight: Weight, ours: str, theirs: str) -> Link:
    """Return the link of one tensor of a layer. ours, theirs: prefixes."""
    ours_name, shape = f"{ours}{weight.name}", weight.shape
    match weight.name:
        case "input_layernorm.weight":
            return same(ours_name, f"{theirs}{names.attention_norm}.weight", *shape)
        case "pre_mlp_layernorm.weight":
            return same(ours_name, f"{theirs}{names.mlp_norm}.weight", *shape)
        case "mlp.linear_fc1.weight":
            half = (shape[0] // 2, shape[1])
            return stacked(ours_name, *(Part(f"{theirs}mlp.{name}_proj.weight", half) for name in ("gate", "up")))
        case "mlp.linear_fc2.weight":
            return same(ours_name, f"{theirs}mlp.down_proj.weight", *shape)
        case "self_attention.input_convolution.conv_weight":
            part = Part(f"{theirs}{names.attention}_conv1d.weight", (shape[0], 1, shape[1]))
            return Link(ours_name, (part,), lambda tensor: tensor.squeeze(1), lambda tensor: [tensor.unsqueeze(1)])
    inner = replace(weight, name=weight.name.removeprefix("self_attention."))
    ours, theirs = f"{ours}self_attention.", f"{theirs}{names.attention}."
    if kind == "softmax":
        return _softmax_link(model.softmax, inner, ours, theirs)
    return _mixer_link(MixerSpec(model.sse, kind), inner, ours, theirs)


def _softmax_link(settings: SoftmaxConfig, weight: Weight, ours: str, theirs: str) -> Link:
    """Return the link of one tensor of a softmax mixer. ours, theirs: prefixes."""
    name, (rows, *columns) = f"{ours}{weight.name}", weight.shape
    if weight.name in ("linear_qkv.weight", "linear_qkv.bias"):
        keys = settings.num_kv_heads * settings.head_dim
        sizes, end = {"q": rows - 2 * keys, "k": keys, "v": keys}, weight.name.rpartition(".")[2]
        parts = (Part(f"{theirs}{part}_proj.{end}", (size, *columns)) for part, size in sizes.items())
        # Megatron keeps the rows of each key head together, with those of its query heads.
        return by_head(name, settings.num_kv_heads, *parts)
    their_name = {
        "linear_proj.weight": "o_proj.weight",
        "q_layernorm.weight": "q_norm.weight",
        "k_layernorm.weight": "k_norm.weight",
    }[weight.name]
    return same(name, f"{theirs}{their_name}", rows, *columns)


def mixer_links(mixer: MixerSpec, hidden: int) -> list[Link]:
    """Return the links of all tensors of an SSE mixer."""
    return [_mixer_link(mixer, weight) for weight in mixer_weights(mixer, hidden)]


def _mixer_link(mixer: MixerSpec, weight: Weight, ours: str = "", theirs: str = "") -> Link:
    """Return the link of one tensor of an SSE mixer. ours, theirs: prefixes."""
    match weight.name:
        case "in_proj.weight":
            return _in_proj(mixer, weight, ours, theirs)
        case "A_log" | "dt_bias":
            return _by_kind(weight, ours, theirs)
        case "conv_weight":
            return _convolution(mixer, weight, ours, theirs)
    return same(f"{ours}{weight.name}", f"{theirs}{_their_name(weight.name)}", *weight.shape)


def _their_name(name: str) -> str:
    """Return the name of a tensor that is the same in both. Raises KeyError for a weight that has no name there."""
    for half, theirs in _HALVES.items():
        if name.endswith(half):
            pair = name.removesuffix(half)
            number = pair.removeprefix("decay_gates.")
            return (_LOW_RANK_NAMES[pair] if number == pair else f"gk_proj.{number}") + theirs
    return _MIXER_NAMES[name]


def _in_proj(mixer: MixerSpec, weight: Weight, ours: str, theirs: str) -> Link:
    _, hidden = weight.shape
    sizes = {name: mixer.key_size for name in mixer.maps} | {"v": mixer.value_size}
    parts = (Part(f"{theirs}{name}_proj.weight", (size, hidden)) for name, size in sizes.items())
    heads = by_head(f"{ours}{weight.name}", mixer.settings.num_heads, *parts)
    if not mixer.recurrence.scalars:
        return heads
    # Theirs: [all shared heads | all sparse heads]. Ours: per value head the scalars, each shared | sparse.
    num_heads, group, kinds = mixer.settings.num_heads, mixer.group_size, mixer.num_bank_kinds
    num_scalars, num_rows = len(mixer.recurrence.scalars), mixer.head_rows["scalars"]
    scalars = tuple(
        Part(f"{theirs}{_SCALARS[name]}_proj.weight", (kinds * num_heads * group, hidden))
        for name in mixer.recurrence.scalars
    )

    def join(*tensors: Tensor) -> Tensor:
        by_kind = torch.stack(tensors[-num_scalars:]).unflatten(1, (kinds, num_heads, group))
        # From [scalars, kinds, heads, group, hidden] to the order of our rows: head, value head, scalar, kind.
        own = by_kind.permute(2, 3, 0, 1, 4).flatten(1, 3)
        projections = heads.join(*tensors[:-num_scalars]).unflatten(0, (num_heads, -1))
        return torch.cat((projections, own), dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        per_head = tensor.unflatten(0, (num_heads, -1))
        own = per_head[:, -num_rows:].unflatten(1, (group, num_scalars, kinds)).permute(2, 3, 0, 1, 4)
        return [*heads.split(per_head[:, :-num_rows].flatten(0, 1)), *own.flatten(1, 3).unbind()]

    return Link(heads.ours, heads.theirs + scalars, join, split)


def _by_kind(weight: Weight, ours: str, theirs: str) -> Link:
    """Link numbers per value head and kind of bank; theirs lists all shared ones first."""
    heads, kinds, *channels = weight.shape
    # With 2 heads, theirs has the rows shared 0 1, sparse 0 1, and ours shared 0, sparse 0 | shared 1, sparse 1.
    return Link(
        f"{ours}{weight.name}",
        (Part(f"{theirs}{weight.name}", (kinds * heads, *channels)),),
        lambda tensor: tensor.unflatten(0, (kinds, heads)).transpose(0, 1),
        lambda tensor: [tensor.transpose(0, 1).flatten(0, 1)],
    )


def _convolution(mixer: MixerSpec, weight: Weight, ours: str, theirs: str) -> Link:
    num_heads, _, head_dim, width = weight.shape
    shape = (num_heads * head_dim, 1, width)
    parts = tuple(Part(f"{theirs}{name}_conv1d_shared.weight", shape) for name in mixer.maps)

    def join(*tensors: Tensor) -> Tensor:
        return torch.stack([tensor.squeeze(1).unflatten(0, (num_heads, -1)) for tensor in tensors], dim=1)

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1).unsqueeze(1) for part in tensor.unbind(1)]

    return Link(f"{ours}{weight.name}", parts, join, split)
