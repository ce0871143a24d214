"""The model's weights, tensor by tensor, from its configuration alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sse.config.schema import ModelConfig


@dataclass(frozen=True)
class Weight:
    """One parameter of the built model.

    part: what it belongs to: embedding, output, norms, convolution, mlp, or the kind of the mixer.
    size: elements of the whole. split: whether tensor ranks hold equal parts of it, or all of it each.
    fp32: also in bf16 runs.
    summed: whether, under sequence parallelism, its gradient is summed over the tensor group once per step.
    """

    part: str
    size: int
    split: bool = False
    fp32: bool = False
    summed: bool = False

    def local_size(self, tensor: int) -> int:
        """Elements on one of `tensor` ranks."""
        return self.size // tensor if self.split else self.size


def model_weights(model: ModelConfig) -> list[Weight]:
    """Weights of the whole model."""
    layers = [weight for kind in model.layer_kinds() for weight in layer_weights(model, kind)]
    output = [] if model.tie_embeddings else [embedding_weight(model, "output")]
    return [embedding_weight(model), *layers, norm_weight(model), *output]


def embedding_weight(model: ModelConfig, part: str = "embedding") -> Weight:
    """The matrix of the embedding, padding included, or the output's, which has the same size."""
    return Weight(part, model.padded_vocab_size * model.hidden_size, split=True)


def norm_weight(model: ModelConfig) -> Weight:
    return Weight("norms", model.hidden_size, summed=True)


def layer_weights(model: ModelConfig, kind: str) -> list[Weight]:
    """Weights of a transformer layer whose mixer is of `kind`."""
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    mixer = _softmax_weights(model) if kind == "softmax" else _sse_weights(model, kind)
    mlp = [Weight("mlp", 2 * hidden * inner, split=True), Weight("mlp", hidden * inner, split=True)]
    width = model.input_convolution
    convolution = [Weight("convolution", width * hidden, summed=True)] if width else []
    return [norm_weight(model), *convolution, *mixer, norm_weight(model), *mlp]


def _softmax_weights(model: ModelConfig) -> Iterator[Weight]:
    softmax, hidden = model.softmax, model.hidden_size
    queries, keys = softmax.num_heads * softmax.head_dim, softmax.num_kv_heads * softmax.head_dim
    yield Weight("softmax", hidden * (queries + 2 * keys), split=True)
    if softmax.qkv_bias:
        yield Weight("softmax", queries + 2 * keys, split=True)
    if softmax.qk_norm:
        yield from [Weight("softmax", softmax.head_dim, summed=True)] * 2
    yield Weight("softmax", hidden * queries, split=True)


def _sse_weights(model: ModelConfig, kind: str) -> Iterator[Weight]:
    sse, hidden, rank = model.sse, model.hidden_size, model.sse.value_head_dim
    is_delta = (sse.recurrence if kind == "sse" else kind) == "gdn"
    partitions = sse.num_partitions if kind == "sse" else 0
    banks = 2 if partitions and sse.shared_bank else 1  # kinds of banks: shared, sparse
    keys, values = sse.num_heads * sse.head_dim, sse.num_value_heads * sse.value_head_dim
    # With the key map one_minus_decay keys come from the decay.
    maps = 1 if sse.key_map == "one_minus_decay" else 2

    def low_rank(rank: int, outputs: int) -> Iterator[Weight]:
        yield Weight(kind, rank * hidden, summed=True)
        yield Weight(kind, rank * outputs, split=True)

    scalars = 2 * banks * sse.num_value_heads if is_delta else 0  # logits of decay and write strength
    yield Weight(kind, hidden * (maps * keys + values + scalars), split=True)
    if partitions:
        for _ in range(maps):
            yield from low_rank(rank, keys)
        yield Weight(kind, sse.num_routers * partitions * hidden, fp32=True, summed=True)
    if sse.output_gate:
        yield from low_rank(rank, values)
    if is_delta:
        yield from [Weight(kind, banks * sse.num_value_heads, split=True, fp32=True)] * 2
    elif sse.decay == "gate":
        for _ in range(banks):
            yield from low_rank(sse.decay_low_rank, keys)
            yield Weight(kind, keys, split=True)
    if sse.short_convolution:
        yield Weight(kind, maps * keys * sse.short_convolution, split=True)
    yield Weight(kind, sse.value_head_dim)  # output norm
    yield Weight(kind, hidden * values, split=True)
