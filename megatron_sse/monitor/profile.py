"""Profiling a window of steps with torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerAction, ProfilerActivity, profile, tensorboard_trace_handler

from megatron_sse.monitor.output import Output
from megatron_sse.run_folder import TENSORBOARD

logger = logging.getLogger(__name__)

NUM_OPERATIONS = 30


class ProfileWindow:
    """A profile of this rank over a window of steps. steps: the first and the last.

    folder: the run folder; the trace is written to its TensorBoard folder, a table of the operations to itself.
    """

    def __init__(self, steps: list[int], folder: Path, on_gpu: bool) -> None:
        self.first, self.last = steps
        self.folder, self.on_gpu = folder, on_gpu
        self.profiler: profile | None = None
        self.has_recorded = False

    def before(self, step: int) -> None:
        """Start the profiler one step before the window; called before each step, counted from 1."""
        # The step before is a warm-up, since starting the profiler takes time itself.
        if self.profiler is None and self.first - 1 <= step <= self.last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
            self.profiler = profile(
                activities=activities,
                schedule=lambda number: self._action(step + number),
                on_trace_ready=self._save,
            )
            self.profiler.start()

    def after(self, step: int) -> None:
        """Advance the profiler, and stop it at the last step of the window; called after each step."""
        if self.profiler is not None:
            self.has_recorded = step >= self.first
            self.profiler.step()
            if step == self.last:
                self.close()

    def close(self) -> None:
        """Save what has been recorded, at the end of the window or of the run."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _action(self, step: int) -> ProfilerAction:
        if step < self.first:
            return ProfilerAction.WARMUP
        if step > self.last:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD if step < self.last else ProfilerAction.RECORD_AND_SAVE

    def _save(self, profiler: profile) -> None:
        # The run may have ended right after the warm-up step.
        if not self.has_recorded:
            return
        with Output("profile").attempt():
            self._write(profiler)

    def _write(self, profiler: profile) -> None:
        name = f"rank{dist.get_rank()}_steps_{self.first}-{self.last}"
        traces = self.folder / TENSORBOARD / "profile"
        tensorboard_trace_handler(str(traces), worker_name=name, use_gzip=True)(profiler)
        key = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        table = self.folder / f"profile_{name}.txt"
        table.write_text(profiler.key_averages().table(sort_by=key, row_limit=NUM_OPERATIONS))
        logger.info("profile: operations by time in %s, trace in %s (for https://ui.perfetto.dev)", table, traces)
