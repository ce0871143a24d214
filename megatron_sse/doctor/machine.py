"""The machine: GPUs, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_sse.checkpoint.folders import checkpoint_folder, find_left_overs, list_checkpoints
from megatron_sse.config import RunConfig
from megatron_sse.config.weights import model_weights
from megatron_sse.doctor.finding import BAD, GOOD, OPEN, Finding
from megatron_sse.doctor.versions import check_versions
from megatron_sse.planning.ceilings import GIB
from megatron_sse.visible import count_of


def check_gpu() -> Iterator[Finding]:
    """Check the GPUs, the packages that only GPUs need, and NCCL."""
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
    yield from check_versions("gpu")
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
