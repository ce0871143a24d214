"""Checking that a checkpoint holds the model that a run describes, and describing how they differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sse.checkpoint.index import tensors_of
from megatron_sse.checkpoint.names import OPTIMIZER
from megatron_sse.checkpoint.settings import changed_settings, flatten
from megatron_sse.checkpoint.state import MASTER
from megatron_sse.config import RunConfig
from megatron_sse.errors import SharedUserError

_MAX_LINES = 20

Shapes = dict[str, tuple[int, ...]]


def check_architecture(path: Path, config: RunConfig, state: dict[str, Any], index: Metadata) -> None:
    """Compare the tensors that this run loads with those in the checkpoint; all ranks together.

    state: the tensors that this rank loads. Raises SharedUserError with a table of the model's settings that differ,
    and then of the tensors.
    """
    wanted, padded = _wanted(state)
    there = {key: tuple(entry.size) for key, entry in tensors_of(index).items()}
    if not any(key.startswith(OPTIMIZER) and not key.startswith(MASTER) for key in wanted):
        there = {key: shape for key, shape in there.items() if not key.startswith(OPTIMIZER) or key in wanted}
    model_keys = [key for key in flatten(config.model_dump(mode="json")) if key.startswith("model.")]
    settings = changed_settings(path, config, model_keys)
    same_vocabulary = not any(line.startswith("model.vocab_size:") for line in settings)
    tensors = []
    for key in sorted(wanted.keys() | there.keys()):
        # An fp32 copy in the checkpoint that this run does not load by name: either the weight itself is loaded from
        # the copy, or the run needs no copy.
        if key not in wanted and (key.startswith(MASTER) or MASTER + key in wanted):
            continue
        if wanted.get(key) == there.get(key):
            continue
        # The number of rows that pad the vocabulary depends on the layout.
        if key in padded and key in there and same_vocabulary and wanted[key][1:] == there[key][1:]:
            continue
        tensors.append(f"{key}: {_show(there.get(key))} in the checkpoint, {_show(wanted.get(key))} in this run")
    # Two vocabularies of different sizes may be padded to the same shapes.
    if tensors or not same_vocabulary:
        lines = settings + tensors
        if len(lines) > _MAX_LINES:
            lines = [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more"]
        table = [f"  {line}" for line in lines]
        raise SharedUserError(f"{path}: the checkpoint's architecture differs from that of this run", *table)


def _wanted(state: dict[str, Any]) -> tuple[Shapes, set[str]]:
    """Return the full shapes of the tensors that all ranks load, by key, and the keys of those that are padded."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        every, [(tensor.key, tensor.global_shape, tensor.allow_shape_mismatch) for tensor in _tensors(state)]
    )
    described = [tensor for tensors in every for tensor in tensors]
    return {key: tuple(shape) for key, shape, _ in described}, {key for key, _, padded in described if padded}


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            yield entry
        else:
            yield from nested_values({"parts": entry.build()})


def _show(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else " x ".join(map(str, shape)) or "one number"
