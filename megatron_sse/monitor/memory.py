"""Where a GPU's memory goes: snapshots for https://pytorch.org/memory_viz, and advice when it runs out."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sse.config import RunConfig

logger = logging.getLogger(__name__)

# Allocations and releases in a snapshot, with where they were made: a few kB each.
MOST_EVENTS = 100_000


class MemoryWindow:
    """Records the GPU's allocations of this rank and writes them to `folder`. steps: the first and the last one."""

    def __init__(self, steps: list[int], folder: Path) -> None:
        self.first, self.last = steps
        self.folder = folder
        self.is_recording = False

    def before(self, step: int) -> None:
        """Before each step, counted from 1."""
        if not self.is_recording and self.first <= step <= self.last:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self.is_recording = True

    def after(self, step: int) -> None:
        """After each step."""
        if step == self.last:
            self.close()

    def close(self) -> None:
        """End of the window or of the run: what has been recorded is saved."""
        if self.is_recording:
            write_snapshot(self.folder, f"steps_{self.first}-{self.last}")
            torch.cuda.memory._record_memory_history(enabled=None)
            self.is_recording = False


def write_snapshot(folder: Path, name: str) -> None:
    """Write what the GPU's memory holds, and the recorded history if there is one, to a file in the run folder."""
    path = folder / f"memory_rank{dist.get_rank()}_{name}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        logger.warning("memory snapshot: %s", error)
        return
    # Other ranks log warnings alone, and the file may be the only sign of what happened.
    logger.warning("memory snapshot: %s (for https://pytorch.org/memory_viz)", path)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor found no room, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def report_out_of_memory(error: BaseException, config: RunConfig) -> None:
    """Say what to change, and keep a snapshot of a GPU's memory."""
    if isinstance(error, torch.OutOfMemoryError):
        write_snapshot(Path(config.monitor.folder), "out_of_memory")
    logger.error("rank %d: out of memory; %s", dist.get_rank(), advise(config))


def advise(config: RunConfig) -> str:
    """The settings that would save memory in this run, the cheapest first."""
    training, parallel = config.training, config.parallel
    changes = []
    if training.micro_batch_size > 1:
        changes.append(f"training.micro_batch_size={training.micro_batch_size // 2}")
    if training.recompute == "none":
        changes.append("training.recompute=full")
    changes += [f"parallel.context={2 * parallel.context}", "more parallel.tensor or parallel.pipeline"]
    return f"what needs less: {', '.join(changes)}; `megatron-sse plan` with the same settings says what fits"
