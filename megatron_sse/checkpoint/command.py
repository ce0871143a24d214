"""`megatron-sse inspect`: print what a checkpoint holds and whether it is intact."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sse.checkpoint.folders import named_checkpoint, why_unusable
from megatron_sse.checkpoint.index import IndexRefusedError, read_index, tensors_of
from megatron_sse.checkpoint.manifest import Manifest, find_damage, read_manifest
from megatron_sse.checkpoint.names import INDEX, OPTIMIZER
from megatron_sse.checkpoint.request import Request
from megatron_sse.checkpoint.verify import find_missing

_DAMAGED_EXIT = 1


def run(request: Request) -> int:
    """Print what a checkpoint holds; return 0, or 1 where it is damaged. Raises UserError where there is none."""
    hashes = not request.sizes
    path = named_checkpoint("DIR", request.checkpoint)
    manifest = read_manifest(path)
    damaged = {name: find_damage(path, manifest, [name], hashes) for name in manifest.files}
    wrong = [line for lines in damaged.values() for line in lines]
    lines = [str(path), *_describe(manifest)]
    # A file whose hash is wrong, or is not known, is not opened.
    intact = [name for name in damaged if not damaged[name]]
    wrong += [line for line in find_missing(path, manifest, intact) if line not in wrong]
    if INDEX in intact:
        lines += ["", *_describe_tensors(path, request.tensors)]
    lines += ["", *_describe_files(manifest, damaged)]
    checked = "sizes and hashes" if hashes else "sizes, and hashes below 1 MiB,"
    if reason := why_unusable(path):
        lines += ["", f"not resumed from without being named: {reason}"]
    lines += ["", *(wrong or [f"{checked} of all files match the manifest"])]
    print("\n".join(lines))
    return _DAMAGED_EXIT if wrong else 0


def _describe(manifest: Manifest) -> list[str]:
    layout = ", ".join(f"{name} {_show(value)}" for name, value in manifest.layout.items())
    return [
        f"  step               {manifest.step}",
        f"  samples            {manifest.consumed_samples}",
        f"  holds              {'weights and optimizer' if manifest.optimizer else 'weights only'}",
        f"  saved at           {layout}",
        f"  written by         {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
        f"  size               {_size(manifest.size())} in {len(manifest.files)} files",
    ]


def _describe_tensors(path: Path, each: bool) -> list[str]:
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
        size = _size(elements * dtype.itemsize)
        lines.append(f"  {kind:<24}{_type(dtype):<12}{len(entries):>8}{elements:>16,}{size:>12}")
    if each:
        lines += ["", f"  {'tensor':<72}{'type':<12}{'parts':>6}  shape"]
        for key, entry in sorted(stored.items()):
            shape = " x ".join(map(str, entry.size))
            lines.append(f"  {key:<72}{_type(entry.properties.dtype):<12}{len(entry.chunks):>6}  {shape}")
    return lines


def _describe_files(manifest: Manifest, damaged: dict[str, list[str]]) -> list[str]:
    lines = [f"  {'file':<24}{'size':>12}  {'SHA-256':<64}  state"]
    for name, entry in manifest.files.items():
        lines.append(f"  {name:<24}{_size(entry.size):>12}  {entry.sha256}  {'damaged' if damaged[name] else 'intact'}")
    return lines


def _size(number: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
