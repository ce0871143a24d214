"""Loading a checkpoint that was found intact: at any layout, with either optimizer, in either precision."""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sse.checkpoint.architecture import check_architecture
from megatron_sse.checkpoint.common import first_line, read_common
from megatron_sse.checkpoint.index import read_index
from megatron_sse.checkpoint.names import COMMON, OPTIMIZER
from megatron_sse.checkpoint.state import (
    MASTER,
    MOMENTS,
    Entry,
    model_state,
    optimizer_state,
    set_num_steps,
)
from megatron_sse.config import RunConfig
from megatron_sse.errors import SharedUserError


def load_checkpoint(
    path: Path,
    config: RunConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> tuple[int, int]:
    """Load model and optimizer; return the steps done and samples consumed. Every rank calls it.

    path: a checkpoint that verify.py has found intact. Raises SharedUserError, with a table, for another architecture.
    """
    index = read_index(path)
    if not any(key.startswith(OPTIMIZER) for key in index.state_dict_metadata):
        raise SharedUserError(
            f"checkpoint.resume: {path} holds only weights; give a run's checkpoint, or give this one as "
            f"checkpoint.load_weights to start from its weights"
        )
    common = read_common(path)
    if common.optimizer_step is None:
        raise SharedUserError(f"{path / COMMON}: optimizer_step is missing")
    _load(path, config, chunks, optimizer, groups, index, ("master", *MOMENTS))
    set_num_steps(optimizer, common.optimizer_step)
    return common.step, common.consumed_samples


def load_weights(
    path: Path,
    config: RunConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> None:
    """Load only the weights, for a new run that starts from them; otherwise as load_checkpoint."""
    _load(path, config, chunks, optimizer, groups, read_index(path), ("master",))


def _load(
    path: Path,
    config: RunConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    index: Metadata,
    names: tuple[str, ...],
) -> None:
    stored = index.state_dict_metadata
    model = model_state(chunks, groups)
    # A checkpoint of an fp32 run has no fp32 copies: load them from its weights, which are fp32.
    state: dict[str, Any] = {
        "optimizer": {
            number: replace(piece, key=piece.key.removeprefix(MASTER)) if piece.key not in stored else piece
            for number, piece in optimizer_state(model, optimizer, names).items()
        }
    }
    for name, entries in model.items():
        state[name] = {local: _best_source(entry, stored) for local, entry in entries.items()}
    check_architecture(path, config, state, index)
    loaded = _load_on_all_ranks(state, path)
    for stage, chunk in enumerate(chunks):
        # Only Transformer Engine's state for fp8 may be missing.
        missing, unexpected = chunk.module.load_state_dict(loaded[f"model{stage}"], strict=False)
        assert not unexpected and all(key.endswith("_extra_state") for key in missing), (missing, unexpected)


def _load_on_all_ranks(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Load this rank's part. Raises SharedUserError on every rank where one rank cannot load its part."""
    causes: set[str] = set()
    try:
        loaded = dist_checkpointing.load(state, str(path), validate_access_integrity=False)
    except CheckpointException as error:
        causes = {first_line(cause) for cause, _ in error.failures.values()}
    # Megatron-Core 0.16 raises on all ranks; 0.19, whose ranks load by themselves, only on those that failed.
    every: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, causes)
    failed = sorted(set().union(*every))
    if failed:
        raise SharedUserError(f"{path}: cannot be loaded ({'; '.join(failed)})")
    return loaded


def _best_source(entry: Entry, stored: Container[str]) -> Entry:
    """Return the entry to load a weight from: for an fp32 weight its fp32 copy, where a bf16 run has saved one."""
    if entry.data.dtype == torch.float32 and MASTER + entry.key in stored:
        return replace(entry, key=MASTER + entry.key)
    return entry
