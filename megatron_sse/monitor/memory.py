"""GPU memory: snapshots for https://pytorch.org/memory_viz, and advice when it runs out."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_sse.config import RunConfig
from megatron_sse.monitor.output import Output
from megatron_sse.parallel.groups import this_rank

logger = logging.getLogger(__name__)

# Allocations and releases in a snapshot; each takes a few kB, for its stack trace.
MOST_EVENTS = 100_000


class MemoryWindow:
    """A recorder of this rank's GPU allocations in a window of steps, written to `folder`. steps: first and last."""

    def __init__(self, steps: list[int], folder: Path) -> None:
        self.first, self.last = steps
        self.folder = folder
        self.is_recording = False

    def before(self, step: int) -> None:
        """Start recording at the first step of the window; called before each step, counted from 1."""
        if not self.is_recording and self.first <= step <= self.last:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self.is_recording = True

    def after(self, step: int) -> None:
        """Stop recording at the last step of the window; called after each step."""
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Save what has been recorded, at the end of the window or of the run."""
        if self.is_recording:
            write_snapshot(self.folder, f"steps_{self.first}-{self.last}")
            torch.cuda.memory._record_memory_history(enabled=None)
            self.is_recording = False


def write_snapshot(folder: Path, name: str) -> None:
    """Write a snapshot of the GPU's memory, with its history where one was recorded, to a file in the run folder."""
    path = folder / f"memory_rank{this_rank()}_{name}.pickle"
    with Output("memory snapshot").attempt():
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        # A warning, since ranks other than 0 log only warnings, and the file may be the only sign of what happened.
        logger.warning("memory snapshot: %s (for https://pytorch.org/memory_viz)", path)


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error means that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def report_out_of_memory(error: BaseException, config: RunConfig) -> None:
    """Log what to change, and write a snapshot of a GPU's memory."""
    if isinstance(error, torch.OutOfMemoryError):
        write_snapshot(Path(config.monitor.folder), "out_of_memory")
    logger.error("rank %d: out of memory; %s", this_rank(), advise(config))


def advise(config: RunConfig) -> str:
    """Return a text with the settings that would save memory in this run, the cheapest first."""
    training, parallel, rl = config.training, config.parallel, config.rl
    changes = []
    if rl is not None and rl.answers_at_once > rl.group_size:
        changes.append(f"rl.answers_at_once={max(rl.group_size, rl.answers_at_once // 2)}")
    if training.micro_batch_size > 1:
        changes.append(f"training.micro_batch_size={training.micro_batch_size // 2}")
    if training.recompute != "full":
        changes.append("training.recompute=full")
    changes += [f"parallel.context={2 * parallel.context}", "more parallel.tensor or parallel.pipeline"]
    return f"to save memory: {', '.join(changes)}; `megatron-sse plan` with the same settings shows what fits"
