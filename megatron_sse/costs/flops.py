"""Arithmetic of the model per token, as functions of its configuration alone.

Counted are matrix products, two operations a multiply-add; element-wise work is not. Recomputed activations are not
counted either: the number says what the model needs, whatever a run does to save memory.
"""

from __future__ import annotations

from megatron_sse.config import ModelConfig
from megatron_sse.config.mixer import MixerSpec
from megatron_sse.config.weights import layer_weights


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Return the operations of forward and backward, the backward pass counting as two forward ones."""
    return 3 * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Return the operations of one forward pass per token of a sequence of one document."""
    total = output_flops(model)
    for kind in model.layer_kinds():
        weights = sum(weight.size for weight in layer_weights(model, kind) if weight.multiplied)
        total += 2.0 * weights + _attention_flops(model, kind, sequence_length)
    return total


def output_flops(model: ModelConfig) -> float:
    """Return the forward operations per token of the output layer, without the rows that pad the vocabulary."""
    return 2.0 * model.hidden_size * model.vocab_size


def mlp_flops(model: ModelConfig) -> float:
    """Return the forward operations per token of a layer's MLP: gate, up and down."""
    return 6.0 * model.hidden_size * model.ffn_hidden_size


def mixer_flops(model: ModelConfig, kind: str, sequence_length: int) -> float:
    """Return the forward operations per token of the mixer of a layer of `kind`, without what is in front of it."""
    weights = sum(weight.size for weight in layer_weights(model, kind) if weight.multiplied and weight.part == kind)
    return 2.0 * weights + _attention_flops(model, kind, sequence_length)


def _attention_flops(model: ModelConfig, kind: str, sequence_length: int) -> float:
    """Return the operations per token that involve no weights: scores and sums of values, or writes and reads."""
    if kind == "softmax":
        softmax = model.softmax
        context = mean_context(sequence_length, softmax.window)
        return 2.0 * 2 * softmax.num_heads * softmax.head_dim * context
    mixer, sse = MixerSpec(model.sse, kind), model.sse
    writes = mixer.has_shared + (sse.num_writers if mixer.num_partitions else 0)
    reads = mixer.has_shared + (sse.num_readers if mixer.num_partitions else 0)
    # A read is q S; each is a product with a key x value state.
    products = writes * mixer.recurrence.write_products + reads
    return 2.0 * products * mixer.value_size * sse.head_dim


def mean_context(length: int, window: int | None) -> float:
    """Return how many tokens a token of a causal sequence sees on average, its own included."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
