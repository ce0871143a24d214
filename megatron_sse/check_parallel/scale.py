"""Rules that make the user's settings small and keep which layouts are possible."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_sse.check_parallel.layouts import MAX_RANKS, num_ranks
from megatron_sse.config import ParallelConfig, RunConfig
from megatron_sse.config.pattern import expand_pattern
from megatron_sse.config.schema import Source

Values = dict[str, Any]
Layouts = list[ParallelConfig]

HIDDEN_SIZE = 64
HEADS_PER_RANK = 2
HEAD_DIM = 16
TOKENS = 128
VOCABULARY = 250
LARGEST_GRADIENT = 1e12


def scale(config: RunConfig, layouts: Layouts, as_is: bool) -> tuple[Values, list[str]]:
    """Return the settings to compare in `layouts`, as sections of values, and a line for each rule that changed some.

    as_is: change no sizes, only what makes a comparison possible.
    """
    layouts = [parallel for parallel in layouts if num_ranks(parallel) <= MAX_RANKS]
    values = config.model_dump()
    lines = []
    for name, rule in (_COMPARABLE if as_is else _SIZES | _COMPARABLE).items():
        before = copy.deepcopy(values)
        rule(values, layouts)
        changes = ", ".join(_changes(before, values, ""))
        if changes:
            lines.append(f"{name:<16}{changes}")
    return values, lines


def _changes(before: Values, after: Values, prefix: str) -> Iterator[str]:
    for key, value in after.items():
        if isinstance(value, dict):
            yield from _changes(before.get(key, {}), value, f"{prefix}{key}.")
        elif value != before.get(key):
            yield f"{prefix}{key} {_short(before.get(key))} -> {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        # A blend, which is printed as its files and tasks.
        return " + ".join(str(Source(**entry)) for entry in value)
    return "null" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def smallest(size: int, at_least: int, keeps: Callable[[int], bool]) -> int:
    """Return the smallest value from min(size, at_least) to `size` that keeps() accepts; `size` is always accepted."""
    return next(value for value in range(min(size, at_least), size + 1) if value == size or keeps(value))


def _alike(size: int, value: int, divisors: set[int]) -> bool:
    """Check whether each of these divisors divides both numbers or neither."""
    return all((size % divisor == 0) == (value % divisor == 0) for divisor in divisors)


def _tensor_sizes(layouts: Layouts) -> set[int]:
    return {parallel.tensor for parallel in layouts} | {1}


def _layers(values: Values, layouts: Layouts) -> None:
    """Keep complete periods of the pattern, as few as the pipelines allow."""
    model = values["model"]
    period, num_layers = len(expand_pattern(model["layers"])), model["num_layers"]
    stages = {parallel.pipeline * parallel.virtual_pipeline for parallel in layouts}
    model["num_layers"] = smallest(
        num_layers, period, lambda value: value % period == 0 and _alike(num_layers, value, stages)
    )


def _heads(values: Values, layouts: Layouts) -> None:
    sizes = _tensor_sizes(layouts)
    at_least = HEADS_PER_RANK * max(sizes)
    sse, softmax = values["model"]["sse"], values["model"]["softmax"]
    if sse["num_heads"]:
        heads, group = sse["num_heads"], sse["num_value_heads"] // sse["num_heads"]
        sse["num_heads"] = smallest(heads, at_least, lambda value: _alike(heads, value, sizes))
        sse["num_value_heads"] = group * sse["num_heads"]
    if softmax["num_heads"]:
        softmax["num_heads"], softmax["num_kv_heads"] = _softmax_heads(
            softmax["num_heads"], softmax["num_kv_heads"], sizes, at_least
        )


def _softmax_heads(heads: int, kv_heads: int, sizes: set[int], at_least: int) -> tuple[int, int]:
    """Return fewer query and key-value heads, in groups of the same kind and split alike by the tensor ranks."""

    def fits(kv: int, size: int) -> bool:
        return kv % size == 0 or size % kv == 0

    for fewer in range(min(heads, at_least), heads):
        for kv in range(1, min(fewer, kv_heads) + 1):
            same_kind = (kv == 1, kv == fewer) == (kv_heads == 1, kv_heads == heads)
            same_splits = _alike(heads, fewer, sizes) and all(fits(kv, n) == fits(kv_heads, n) for n in sizes)
            if fewer % kv == 0 and same_kind and same_splits:
                return fewer, kv
    return heads, kv_heads


def _head_dims(values: Values, layouts: Layouts) -> None:
    sse, softmax = values["model"]["sse"], values["model"]["softmax"]
    dim = sse["head_dim"]
    if dim:
        sse["head_dim"] = min(dim, HEAD_DIM)
        sse["value_head_dim"] = max(1, sse["value_head_dim"] * sse["head_dim"] // dim)
        if sse["key_topk"]:
            sse["key_topk"] = max(1, sse["key_topk"] * sse["head_dim"] // dim)
    if softmax["head_dim"]:
        # Rotary embeddings need pairs of channels: an even size stays even.
        softmax["head_dim"] = min(softmax["head_dim"], HEAD_DIM - softmax["head_dim"] % 2)


def _hidden_size(values: Values, layouts: Layouts) -> None:
    """Shrink both sizes; initial weights grow with the root of the ratio, so that projections keep their magnitude."""
    model = values["model"]
    hidden, inner, sizes = model["hidden_size"], model["ffn_hidden_size"], _tensor_sizes(layouts)
    model["hidden_size"] = min(hidden, HIDDEN_SIZE)
    # Rounded up: the MLP keeps its ratio to the hidden size.
    at_least = -(-inner * model["hidden_size"] // hidden)
    model["ffn_hidden_size"] = smallest(inner, at_least, lambda value: _alike(inner, value, sizes))
    model["init_std"] *= math.sqrt(hidden / model["hidden_size"])


def _vocabulary(values: Values, layouts: Layouts) -> None:
    model = values["model"]
    size, multiple, sizes = model["vocab_size"], model["vocab_multiple"], _tensor_sizes(layouts)

    def padded(value: int) -> int:
        return -(-value // multiple) * multiple

    model["vocab_size"] = smallest(size, VOCABULARY, lambda value: _alike(padded(size), padded(value), sizes))


def _sequence_length(values: Values, layouts: Layouts) -> None:
    """Shorten the sequence; the window keeps its share of it."""
    data, softmax = values["data"], values["model"]["softmax"]
    # Zigzag cuts a sequence into 2 slots per context rank, and sequence parallelism cuts those again.
    splits = {2 * parallel.context * parallel.tensor for parallel in layouts}
    splits |= {split // 2 for split in splits} | {2 * parallel.context for parallel in layouts}
    length = data["sequence_length"]
    data["sequence_length"] = smallest(length, TOKENS, lambda value: _alike(length, value, splits))
    if softmax["window"]:
        softmax["window"] = max(2, softmax["window"] * data["sequence_length"] // length)


def _batch(values: Values, layouts: Layouts) -> None:
    """Set a batch that gives every rank at least two micro-batches."""
    training = values["training"]
    training["micro_batch_size"] = min(training["micro_batch_size"], 2)
    rounds = [(p.data or 1) * (p.pipeline if p.virtual_pipeline > 1 else 1) for p in layouts]
    training["global_batch_size"] = 2 * training["micro_batch_size"] * math.lcm(*rounds)


def _precision(values: Values, layouts: Layouts) -> None:
    """Set fp32, also for states that are sent between ranks."""
    values["training"]["precision"] = values["parallel"]["hand_off_wire"] = "fp32"


def _dropout(values: Values, layouts: Layouts) -> None:
    for name in ("hidden_dropout", "attention_dropout"):
        if name in values["model"]["transformer"]:
            values["model"]["transformer"][name] = 0.0


def _gradients(values: Values, layouts: Layouts) -> None:
    """Keep complete gradients on every rank, and turn clipping off by a limit that none reaches."""
    values["optimizer"]["clip_grad"] = LARGEST_GRADIENT
    values["parallel"]["distributed_optimizer"] = False


def _documents(values: Values, layouts: Layouts) -> None:
    values["data"] |= {"train": "random packed documents", "validation": None, "validation_share": 0.0, "corpus": None}


Rules = dict[str, Callable[[Values, Layouts], None]]
_SIZES: Rules = {
    "layers": _layers,
    "heads": _heads,
    "head dims": _head_dims,
    "hidden size": _hidden_size,
    "vocabulary": _vocabulary,
    "sequence": _sequence_length,
    "batch": _batch,
}
_COMPARABLE: Rules = {"fp32": _precision, "dropout": _dropout, "gradients": _gradients, "data": _documents}
