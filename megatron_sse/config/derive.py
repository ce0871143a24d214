"""Values that follow from the settings, for people to read before a run starts."""

from collections import Counter

from megatron_sse.config.checks import check_world_size
from megatron_sse.config.schema import ModelConfig, RunConfig


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part, over all layers: embedding, output, norms, mlp and the mixers by kind of layer.

    The embedding counts with its padding; a tied output has no parameters of its own.
    """
    kinds = Counter(model.layer_kinds())
    embedding = model.padded_vocab_size * model.hidden_size
    counts = {
        "embedding": embedding,
        "output": 0 if model.tie_embeddings else embedding,
        "norms": (2 * model.num_layers + 1) * model.hidden_size,
        "mlp": 3 * model.num_layers * model.hidden_size * model.ffn_hidden_size,
    }
    for kind, layers in kinds.items():
        counts[kind] = layers * (_softmax_mixer(model) if kind == "softmax" else _sse_mixer(model, kind))
    return counts


def _softmax_mixer(model: ModelConfig) -> int:
    softmax = model.softmax
    queries, keys = softmax.num_heads * softmax.head_dim, softmax.num_kv_heads * softmax.head_dim
    count = model.hidden_size * (2 * queries + 2 * keys)
    return count + softmax.qk_norm * 2 * softmax.head_dim + softmax.qkv_bias * (queries + 2 * keys)


def _sse_mixer(model: ModelConfig, kind: str) -> int:
    sse, hidden, rank = model.sse, model.hidden_size, model.sse.value_head_dim
    recurrence = sse.recurrence if kind == "sse" else kind
    partitions = sse.num_partitions if kind == "sse" else 0
    banks = 2 if partitions else 1  # kinds of banks: shared, sparse
    keys, values = sse.num_heads * sse.head_dim, sse.num_value_heads * sse.value_head_dim
    # With the key map one_minus_decay keys come from the decay.
    maps = 1 if sse.key_map == "one_minus_decay" else 2

    count = hidden * (maps * keys + 2 * values)  # queries, keys, values, output
    count += maps * keys * sse.short_convolution
    count += sse.value_head_dim  # output norm
    if partitions:
        count += partitions * hidden + maps * rank * (hidden + keys)  # router, low-rank part of the sparse banks
    if sse.output_gate:
        count += rank * (hidden + values)
    if recurrence == "gdn":
        count += banks * sse.num_value_heads * (2 * hidden + 2)  # decay and write strength; A_log and dt_bias
    elif sse.decay == "gate":
        count += banks * (sse.decay_low_rank * (hidden + keys) + keys)
    return count


def choose_layout(config: RunConfig) -> tuple[bool, str]:
    """Whether context ranks hold zigzag parts of the sequences (else contiguous ones), and why.

    Zigzag balances causal attention; it doubles the states that SSE layers hand off, where contiguous parts would have
    to be rearranged around the softmax layers instead. The break-even is where both move the same bytes.
    """
    parallel, model, length = config.parallel, config.model, config.data.sequence_length
    if parallel.context == 1 or parallel.layout != "auto":
        return parallel.layout == "zigzag" and parallel.context > 1, "as set"
    kinds = Counter(model.layer_kinds())
    linear, softmax = sum(kinds.values()) - kinds["softmax"], kinds["softmax"]
    if not softmax:
        return False, "no softmax layer to balance"
    if config.data.reset_at_documents:
        return False, "packed documents"
    if length % (2 * parallel.context * (parallel.tensor if parallel.sequence else 1)):
        return False, f"{2 * parallel.context} slots do not divide the sequence"
    if not linear:
        return True, "softmax layers only"
    factor = 3 if "gdn" in model.recurrences() else 2
    banks = 1 + (model.sse.num_partitions if "sse" in kinds else 0)
    break_even = factor * linear * model.sse.value_head_dim * banks // softmax
    tokens = length // parallel.context
    return tokens > break_even, f"{tokens:,} tokens a rank, break-even at {break_even:,}"


def describe_run(config: RunConfig, world_size: int) -> list[str]:
    """What a run of `world_size` processes will be, one line per fact. Raises UserError where sizes do not divide."""
    model, parallel, training = config.model, config.parallel, config.training
    data_size = check_world_size(config, world_size)
    counts = count_parameters(model)
    layers = ", ".join(f"{count} {kind}" for kind, count in Counter(model.layer_kinds()).items())
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    tokens = training.global_batch_size * config.data.sequence_length
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_size)
    zigzag, reason = choose_layout(config)
    layout = f"{'zigzag' if zigzag else 'contiguous'} ({reason})"
    return [
        f"layers            {model.num_layers} ({layers}), hidden size {model.hidden_size}",
        f"parameters        {sum(counts.values()):,} ({parts})",
        f"processes         {world_size} (tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {data_size})",
        *([f"context layout    {layout}"] if parallel.context > 1 else []),
        f"tokens per step   {tokens:,} ({training.global_batch_size} sequences of {config.data.sequence_length:,})",
        f"micro-batches     {micro_batches} per step of {training.micro_batch_size} sequences each",
        f"tokens in all     {tokens * training.steps:,} in {training.steps:,} steps",
    ]
