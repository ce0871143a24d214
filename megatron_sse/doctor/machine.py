"""The machine: versions, GPUs, room on the disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from megatron_sse.checkpoint.folders import checkpoint_folder, find_left_overs, list_checkpoints
from megatron_sse.config import RunConfig
from megatron_sse.config.weights import model_weights
from megatron_sse.doctor.finding import BAD, GOOD, OPEN, Finding
from megatron_sse.planning.ceilings import GIB
from megatron_sse.visible import count_of

PACKAGE = "megatron-sse"


def check_versions() -> Iterator[Finding]:
    """Compare installed packages with the requirements; those of the gpu extra only if there is a GPU."""
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(BAD, "versions", f"{PACKAGE} is not installed; ./run.sh test --version installs it in place")
        return
    extra = "gpu" if torch.cuda.is_available() else ""
    wrong, right = [], []
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        # A run starts without it; check_modules reports it.
        if requirement.name == "transformer-engine":
            continue
        problem = _problem(requirement)
        if problem is not None:
            wrong.append(problem)
        elif requirement.name in ("torch", "megatron-core", "triton"):
            right.append(f"{requirement.name} {importlib.metadata.version(requirement.name)}")
    if wrong:
        yield Finding(BAD, "versions", f"{'; '.join(wrong)}: ./run.sh test --version installs the tested ones")
    else:
        yield Finding(GOOD, "versions", ", ".join(right))


def _problem(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version}, needed {requirement.specifier}"


def check_gpu() -> Iterator[Finding]:
    """Check the GPUs, and NCCL."""
    if not torch.cuda.is_available():
        # nvidia-smi comes with the driver, which is installed where there is a GPU.
        if shutil.which("nvidia-smi"):
            advice = "although there is a driver; install torch's CUDA build, or a driver that is new enough"
            yield Finding(BAD, "GPU", f"torch {torch.__version__} finds none, {advice}")
        else:
            yield Finding(OPEN, "GPU", "none: runs use the CPU and gloo, for small models and tests")
        return
    for number in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        if torch.cuda.get_device_capability(number) < (8, 0):
            yield Finding(BAD, f"GPU {number}", f"{name} has no bf16; use one from A100 on")
        else:
            yield Finding(GOOD, f"GPU {number}", f"{name}, {memory / GIB:.0f} GiB")
    if torch.distributed.is_nccl_available():
        yield Finding(GOOD, "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(BAD, "NCCL", "this build of torch has none; install torch's CUDA build for Linux")


def check_disk(config: RunConfig) -> Iterator[Finding]:
    """Check whether there is room for the run's checkpoints."""
    folder = checkpoint_folder(config).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding(BAD, "monitor.folder", f"{existing} cannot be written; set monitor.folder to another folder")
        return
    size, number = checkpoint_bytes(config), _checkpoints_to_come(config, folder)
    left = [file for path in find_left_overs(folder) for file in path.rglob("*") if file.is_file()]
    free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in left)
    text = (
        f"{free / GIB:,.1f} GiB free at {existing}, {count_of(number, 'checkpoint')} of {size / GIB:,.2f} GiB to come"
    )
    if free < number * size:
        text += "; free some, set checkpoint.keep_last, or set monitor.folder to another disk"
    yield Finding(GOOD if free >= number * size else BAD, "disk", text)


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of one checkpoint: weights and two moments; in bf16 runs also the fp32 copies."""
    per_element = 2 + 3 * 4 if config.training.precision == "bf16" else 3 * 4
    return per_element * sum(weight.size for weight in model_weights(config.model))


def _checkpoints_to_come(config: RunConfig, folder: Path) -> int:
    """Return how many more checkpoints may be on the disk at the same time."""
    interval = config.checkpoint.interval
    total = -(-config.training.steps // interval) if interval else 1
    if config.checkpoint.keep_last is not None:
        # An old one is deleted when the new one is complete.
        total = min(total, config.checkpoint.keep_last + 1)
    there = len(list_checkpoints(folder))
    return max(1, total - there)
