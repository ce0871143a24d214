"""Checkpoints of a run: <run folder>/checkpoints/iter_0000100/, and a file `latest` that names the newest.

A checkpoint is written beside its place and renamed when it is complete, so a folder named iter_* is never half.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import RunConfig
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

LATEST = "latest"
# Written last by Megatron-Core, with the kind and version of the files.
_COMPLETE = "metadata.json"


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run keeps its checkpoints."""
    return Path(config.monitor.folder) / "checkpoints"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to go on from as checkpoint.resume says; None to start anew.

    auto: the newest of the run folder, if there is one. A path: a checkpoint, a folder of checkpoints, or a run folder.
    Raises UserError where a path holds none.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return None
    if resume == "auto":
        return _newest(checkpoint_folder(config))
    path = Path(resume)
    if (path / _COMPLETE).is_file():
        return path
    found = _newest(path) or _newest(path / "checkpoints")
    if found is None:
        raise UserError(f"checkpoint.resume: got {resume}, allowed auto, none, or the path of a checkpoint or run")
    return found


def _newest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    if pointer.is_file():
        named = folder / pointer.read_text(errors="replace").strip()
        if named.name.startswith("iter_") and (named / _COMPLETE).is_file():
            return named
        logger.warning("%s names no complete checkpoint; taking the newest that is complete", pointer)
    complete = sorted(path.parent for path in folder.glob(f"iter_*/{_COMPLETE}"))
    return complete[-1] if complete else None


def save_checkpoint(
    folder: Path,
    step: int,
    consumed_samples: int,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> Path:
    """Write the state after `step` steps to folder/iter_<step> and point `latest` at it. Every rank calls it."""
    final = folder / f"iter_{step:07d}"
    partial = folder / f"partial_{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, groups, is_loading=False)
    state |= {"step": step, "consumed_samples": consumed_samples}
    dist_checkpointing.save(state, str(partial))
    if dist.get_rank() == 0:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _replace_file(folder / LATEST, final.name + "\n")
        logger.info("checkpoint saved: %s", final)
    dist.barrier()
    return final


def load_checkpoint(
    path: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> tuple[int, int]:
    """Load model and optimizer, at any layout; returns the steps done and samples consumed. Every rank calls it."""
    loaded = dist_checkpointing.load(_sharded_state(chunks, optimizer, groups, is_loading=True), str(path))
    for stage, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{stage}"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["step"], loaded["consumed_samples"]


def _sharded_state(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    # fully_reshardable: the distributed optimizer's state, too, can be loaded at another layout.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    state: dict[str, Any] = {
        f"model{stage}": chunk.module.sharded_state_dict(metadata=metadata) for stage, chunk in enumerate(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
