"""Every parameter of the model, declared once, from the configuration alone.

The modules, their initial values, weight decay, parameter counts, FLOPs, checkpoints and conversions follow from here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sse.config.mixer import MixerSpec
from megatron_sse.config.schema import ModelConfig

# normal: standard deviation model.init_std; embedding: model.embedding_init_std; residual: model.init_std divided by
# sqrt(2 model.num_layers), for what is added to the residual stream.
Initial = Literal["normal", "embedding", "residual", "ones", "zeros", "log_rate", "time_step", "convolution"]


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: in the built model, without tensor and pipeline parallelism.
        part: what it belongs to: embedding, output, norms, convolution, mlp, or the kind of the mixer.
        shape: of the full tensor.
        split: the dim of which each tensor rank holds an equal part; None where each holds the full tensor.
        fp32: also in bf16 runs.
        summed: under sequence parallelism its gradient is summed over the tensor group once per step.
        initial: how it is drawn.
        decayed: whether weight decay applies.
        multiplied: whether each of its elements enters one multiply-add per token.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    split: int | None = None
    fp32: bool = False
    summed: bool = False
    initial: Initial = "normal"
    decayed: bool = True
    multiplied: bool = True

    @property
    def size(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """Return the shape on one of `tensor` ranks."""
        return tuple(size // tensor if dim == self.split else size for dim, size in enumerate(self.shape))

    def local_size(self, tensor: int) -> int:
        """Return the number of elements on one of `tensor` ranks."""
        return math.prod(self.local_shape(tensor))


def model_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of the whole model."""
    layers = [
        replace(weight, name=f"decoder.layers.{number}.{weight.name}")
        for number, kind in enumerate(model.layer_kinds())
        for weight in layer_weights(model, kind)
    ]
    output = [] if model.tie_embeddings else [output_weight(model)]
    return [embedding_weight(model), *layers, final_norm_weight(model), *output]


def embedding_weight(model: ModelConfig) -> Weight:
    """Return the embedding, padding included."""
    shape = (model.padded_vocab_size, model.hidden_size)
    name = "embedding.word_embeddings.weight"
    return Weight(name, "embedding", shape, split=0, initial="embedding", multiplied=False)


def output_weight(model: ModelConfig) -> Weight:
    """Return the output projection of a model whose embedding is not tied to it."""
    return Weight("output_layer.weight", "output", (model.padded_vocab_size, model.hidden_size), split=0)


def final_norm_weight(model: ModelConfig) -> Weight:
    """Return the norm in front of the output projection."""
    return _norm("decoder.final_layernorm.weight", "norms", model.hidden_size)


def layer_weights(model: ModelConfig, kind: str) -> list[Weight]:
    """Return the weights of a transformer layer whose mixer is of `kind`, by their names in the layer."""
    hidden, inner, width = model.hidden_size, model.ffn_hidden_size, model.input_convolution
    mixer = _softmax_weights(model) if kind == "softmax" else mixer_weights(MixerSpec(model.sse, kind), hidden)
    convolution = []
    if width:
        name, shape = "input_convolution.conv_weight", (hidden, width)
        convolution = [Weight(name, "convolution", shape, summed=True, initial="convolution")]
    return [
        _norm("input_layernorm.weight", "norms", hidden),
        *(replace(weight, name=f"self_attention.{weight.name}") for weight in (*convolution, *mixer)),
        _norm("pre_mlp_layernorm.weight", "norms", hidden),
        Weight("mlp.linear_fc1.weight", "mlp", (2 * inner, hidden), split=0),
        Weight("mlp.linear_fc2.weight", "mlp", (hidden, inner), split=1, initial="residual"),
    ]


def _norm(name: str, part: str, size: int, summed: bool = True) -> Weight:
    return Weight(name, part, (size,), summed=summed, initial="ones", decayed=False, multiplied=False)


def _bias(name: str, part: str, size: int) -> Weight:
    return Weight(name, part, (size,), split=0, initial="zeros", decayed=False, multiplied=False)


def _softmax_weights(model: ModelConfig) -> Iterator[Weight]:
    softmax, hidden = model.softmax, model.hidden_size
    queries, keys = softmax.num_heads * softmax.head_dim, softmax.num_kv_heads * softmax.head_dim
    yield Weight("linear_qkv.weight", "softmax", (queries + 2 * keys, hidden), split=0)
    if softmax.qkv_bias:
        yield _bias("linear_qkv.bias", "softmax", queries + 2 * keys)
    if softmax.qk_norm:
        yield _norm("q_layernorm.weight", "softmax", softmax.head_dim)
        yield _norm("k_layernorm.weight", "softmax", softmax.head_dim)
    yield Weight("linear_proj.weight", "softmax", (hidden, queries), split=1, initial="residual")


def mixer_weights(mixer: MixerSpec, hidden: int) -> Iterator[Weight]:
    """Yield the weights of an SSE mixer, by their names in the mixer."""
    sse, kind, kinds = mixer.settings, mixer.kind, mixer.num_bank_kinds
    heads, value_heads, key_dim, rank = sse.num_heads, sse.num_value_heads, sse.head_dim, sse.value_head_dim

    yield Weight("in_proj.weight", kind, (heads * sum(mixer.head_rows.values()), hidden), split=0)
    if mixer.num_partitions:
        # Keys that are made of the decay have no projection, so no low-rank pair either.
        for name in ("query_lora", "key_lora")[: len(mixer.maps)]:
            yield from _low_rank(name, kind, hidden, rank, mixer.key_size)
        rows = sse.num_routers * mixer.num_partitions
        yield Weight("router.proj.weight", kind, (rows, hidden), fp32=True, summed=True)
    if sse.output_gate:
        yield from _low_rank("output_gate", kind, hidden, rank, mixer.value_size)
    if mixer.recurrence.delta_rule:
        # fp32 also in bf16 runs: the decays are exponentials of exponentials of these.
        channels = (key_dim,) if mixer.recurrence.channel_decay else ()
        numbers = Weight("", kind, (value_heads, kinds), split=0, fp32=True, decayed=False, multiplied=False)
        yield replace(numbers, name="A_log", initial="log_rate")
        yield replace(numbers, name="dt_bias", shape=(value_heads, kinds, *channels), initial="time_step")
    if mixer.has_decay_gates:
        for number in range(kinds):
            yield from _low_rank(f"decay_gates.{number}", kind, hidden, sse.decay_low_rank, mixer.decay_size)
            # The delta rule has dt_bias in its place.
            if not mixer.recurrence.delta_rule:
                yield _bias(f"decay_gates.{number}.up.bias", kind, mixer.decay_size)
    if sse.short_convolution:
        shape = (heads, len(mixer.maps), key_dim, sse.short_convolution)
        yield Weight("conv_weight", kind, shape, split=0, initial="convolution")
    yield _norm("norm_weight", kind, sse.value_head_dim, summed=False)
    yield Weight("out_proj.weight", kind, (hidden, mixer.value_size), split=1, initial="residual")


def _low_rank(name: str, part: str, hidden: int, rank: int, size: int) -> Iterator[Weight]:
    yield Weight(f"{name}.down.weight", part, (rank, hidden), summed=True)
    yield Weight(f"{name}.up.weight", part, (size, rank), split=0)
