"""The tables of `megatron-sse inspect` that describe the tensors of a checkpoint."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sse.checkpoint.index import IndexRefusedError, read_index, tensors_of
from megatron_sse.checkpoint.names import OPTIMIZER
from megatron_sse.visible import size_of


def describe_tensors(path: Path, each: bool) -> list[str]:
    """Return a line per kind of tensor (weights, fp32 copies, moments) and type, and with `each` one per tensor."""
    try:
        stored = tensors_of(read_index(path))
    except IndexRefusedError:
        return []
    kinds: dict[tuple[str, torch.dtype], list[TensorStorageMetadata]] = defaultdict(list)
    for key, entry in stored.items():
        kind = ".".join(key.split(".")[:2]) if key.startswith(OPTIMIZER) else "weights"
        kinds[kind, entry.properties.dtype].append(entry)
    lines = [f"  {'tensors':<24}{'type':<12}{'number':>8}{'elements':>16}{'size':>12}"]
    for (kind, dtype), entries in sorted(kinds.items(), key=str):
        elements = sum(math.prod(entry.size) for entry in entries)
        size = size_of(elements * dtype.itemsize)
        lines.append(f"  {kind:<24}{_type(dtype):<12}{len(entries):>8}{elements:>16,}{size:>12}")
    if each:
        lines += ["", f"  {'tensor':<72}{'type':<12}{'parts':>6}  shape"]
        for key, entry in sorted(stored.items()):
            shape = " x ".join(map(str, entry.size))
            lines.append(f"  {key:<72}{_type(entry.properties.dtype):<12}{len(entry.chunks):>6}  {shape}")
    return lines


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
