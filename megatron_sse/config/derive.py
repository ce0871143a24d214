"""Values that follow from the settings, for people to read before a run starts."""

from collections import Counter

from megatron_sse.config.checks import check_world_size
from megatron_sse.config.schema import ModelConfig, RunConfig
from megatron_sse.config.weights import model_weights


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part, over all layers: embedding, output, norms, mlp and the mixers by kind of layer.

    The embedding counts with its padding; a tied output has no parameters of its own.
    """
    counts = Counter({"embedding": 0, "output": 0})
    for weight in model_weights(model):
        counts[weight.part] += weight.size
    return dict(counts)


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


def uses_distributed_optimizer(config: RunConfig) -> bool:
    """Whether optimizer state is split over the data-parallel group: where asked for, and always in bf16.

    Megatron-Core's other optimizer for bf16 cannot save a model that has fp32 parameters (the routers) as well.
    """
    return config.parallel.distributed_optimizer or config.training.precision == "bf16"


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
