"""Arithmetic of the model per token, as functions of its configuration alone.

Counted are matrix products, two operations a multiply-add; element-wise work is not. Recomputed activations are not
counted either: the number says what the model needs, whatever a run does to save memory.
"""

from __future__ import annotations

from megatron_sse.config import ModelConfig, SoftmaxConfig, SSEConfig


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Operations of forward and backward, the backward pass being two forward ones."""
    return 3 * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Operations of one forward pass per token of a sequence of one document."""
    hidden = model.hidden_size
    total = 2.0 * hidden * model.vocab_size
    for kind in model.layer_kinds():
        total += 2.0 * hidden * (3 * model.ffn_hidden_size + model.input_convolution)
        if kind == "softmax":
            total += softmax_flops(model.softmax, hidden, sequence_length)
        else:
            total += sse_flops(model.sse, hidden, kind)
    return total


def sse_flops(sse: SSEConfig, hidden: int, kind: str) -> float:
    """Forward operations per token of an sse, gla or gdn layer without its MLP."""
    keys, values = sse.num_heads * sse.head_dim, sse.num_value_heads * sse.value_head_dim
    recurrence = sse.recurrence if kind == "sse" else kind
    sparse = kind == "sse" and sse.num_partitions > 0
    shared = sse.shared_bank or not sparse

    # With key = 1 - decay there is no key projection.
    maps = 1 if sse.key_map == "one_minus_decay" else 2
    weights = hidden * (maps * keys + 2 * values)
    if sparse:
        weights += hidden * sse.num_routers * sse.num_partitions + maps * sse.value_head_dim * (hidden + keys)
    if recurrence == "gdn":
        decay = hidden * 2 * sse.num_value_heads
    else:
        decay = sse.decay_low_rank * (hidden + keys) if sse.decay == "gate" else 0
    weights += decay * (shared + sparse)
    if sse.output_gate:
        weights += sse.value_head_dim * (hidden + values)
    weights += maps * sse.short_convolution * keys

    # A write is k^T v, for the delta rule also k S; a read is q S: each a product with a key x value state.
    writes = shared + (sse.num_writers if sparse else 0)
    reads = shared + (sse.num_readers if sparse else 0)
    products = writes * (2 if recurrence == "gdn" else 1) + reads
    return 2.0 * (weights + products * values * sse.head_dim)


def softmax_flops(softmax: SoftmaxConfig, hidden: int, sequence_length: int) -> float:
    """Forward operations per token of a softmax attention layer without its MLP, causal and windowed as configured."""
    weights = hidden * softmax.head_dim * (2 * softmax.num_heads + 2 * softmax.num_kv_heads)
    context = mean_context(sequence_length, softmax.window)
    return 2.0 * (weights + 2 * softmax.num_heads * softmax.head_dim * context)


def mean_context(length: int, window: int | None) -> float:
    """Tokens that a token of a causal sequence sees on average, its own included."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
