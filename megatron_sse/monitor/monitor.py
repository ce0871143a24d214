"""The monitor of a run: a line per step, its scalars in files and at trackers, and the settings that it used."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_sse.config import RunConfig
from megatron_sse.costs.flops import train_flops_per_token
from megatron_sse.costs.gpus import peak_flops
from megatron_sse.data.metadata import BytesOfTokens, read_metadata
from megatron_sse.durable import write_durably
from megatron_sse.installed import find_program
from megatron_sse.monitor.events import Events
from megatron_sse.monitor.health import collect_health
from megatron_sse.monitor.line import Progress
from megatron_sse.monitor.memory import MemoryWindow
from megatron_sse.monitor.metrics import Metrics
from megatron_sse.monitor.output import Output
from megatron_sse.monitor.profile import ProfileWindow
from megatron_sse.monitor.replicas import compare_replicas
from megatron_sse.monitor.spikes import Spikes
from megatron_sse.monitor.straggler import Stragglers
from megatron_sse.monitor.trackers import start_trackers
from megatron_sse.parallel.device import Device
from megatron_sse.run_folder import CONFIG, METRICS, TENSORBOARD

logger = logging.getLogger(__name__)


class Monitor:
    """The reports of a run. Every rank has one and calls its methods, which communicate; rank 0 logs and writes."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        model_chunks: list[torch.nn.Module],
        device: Device,
        first_step: int = 1,
    ):
        self.config = config
        self.groups = groups
        self.model_chunks = model_chunks
        self.device = device
        self.folder = Path(config.monitor.folder)
        self.is_writer = dist.get_rank() == 0
        self.num_processes = dist.get_world_size()
        self.spikes = Spikes(config.monitor.spike_factor) if config.monitor.spike_factor else None
        self.start_stage(config)
        self.peak_flops = peak_flops(device.description)
        self.bytes = bytes_of_validation(config)
        # Tokens and seconds since the last line, and the mean time of a step, in which recent steps weigh most.
        self.tokens, self.seconds = 0, 0.0
        self.mean_seconds: float | None = None
        self.num_skipped = 0
        # Whether the loss has a level that spikes can be above.
        self.watches_loss = True
        self.stragglers: Stragglers | None = None
        if config.monitor.straggler_factor and self.num_processes > 1:
            self.stragglers = Stragglers(config.monitor.straggler_factor, groups.pp.rank(), device.type)
            for chunk in model_chunks:
                get_model_config(chunk).timers = self.stragglers.clock
        # A new run may report before its first step, as step 0.
        first_report = first_step if first_step > 1 else 0
        self.windows = self._find_windows()
        self.settings, self.settings_output = config.to_yaml(), Output(CONFIG)
        self.events: Events | None = None
        self.events_output = Output("TensorBoard events")
        if self.is_writer:
            self._write_settings()
            if config.monitor.tensorboard:
                self.events = Events(self.folder / TENSORBOARD, first_report)
        self.metrics, self.metrics_output = Metrics(self.folder / METRICS, first_report), Output(METRICS)
        self.trackers = start_trackers(config, first_report) if self.is_writer else []

    def start_stage(self, config: RunConfig) -> None:
        """Switch to the settings of a stage, whose sequence length decides the FLOPs per token."""
        self.config = config
        if self.spikes is not None:
            # The loss of longer sequences or other texts is on another level.
            self.spikes.forget()
        self.flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)

    def reports_health(self, step: int) -> bool:
        """Check whether the layers' health is reported after step `step`, counted from 1."""
        return step % self.config.monitor.health_interval == 0

    def comparison(self, step: int) -> Callable[[], None] | None:
        """Return what compares the replicas' weights in step `step`, before its update; None where that is not due.

        Behind the update the distributed optimizer sends each replica's part of the weights over the others', and what
        differed there is lost.
        """
        every = self.config.monitor.replica_check
        return partial(self._compare_replicas, step) if every and step % every == 0 else None

    def before_step(self, step: int) -> None:
        """Prepare for step `step`, counted from 1."""
        for window in self.windows:
            window.before(step)

    def step(
        self,
        step: int,
        losses: dict[str, float],
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        skip: str | None = None,
    ) -> None:
        """Report step `step`, counted from 1, once it is done.

        losses: "loss" and, with SSE layers, "balance_loss" without its coefficient, the same on every rank.
        tokens: number in the global batch. seconds: duration of the step. skip: why the optimizer did not step, on
        any rank; None where it did.
        """
        for window in self.windows:
            window.after(step)
        if tokens:
            self._warn_of_spikes(step, losses["loss"], grad_norm)
        self.num_skipped += skip is not None
        self.tokens += tokens
        self.seconds += seconds
        self.mean_seconds = seconds if self.mean_seconds is None else 0.9 * self.mean_seconds + 0.1 * seconds
        monitor, steps = self.config.monitor, self.config.training.steps
        if step % monitor.log_interval == 0 or step == steps or skip is not None:
            tokens_per_second = self.tokens / self.seconds
            flops_per_gpu = self.flops_per_token * tokens_per_second / self.num_processes
            progress = Progress(
                step=step,
                steps=steps,
                loss=losses["loss"],
                balance_loss=losses.get("balance_loss"),
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens_per_second=tokens_per_second,
                tflops_per_gpu=flops_per_gpu / 1e12,
                mfu=flops_per_gpu / self.peak_flops if self.peak_flops else None,
                memory_gib=self.device.peak_memory_bytes() / 2**30,
                seconds_left=self.mean_seconds * (steps - step),
                skip=skip,
            )
            self.tokens, self.seconds = 0, 0.0
            (self._log if skip is None else self._warn)(progress.line())
            counts = {"speed/processes": self.num_processes, "train/skipped": self.num_skipped}
            if self.spikes is not None:
                counts["train/spikes"] = self.spikes.count
            self._write(step, progress.scalars() | counts)
        if self.stragglers is not None:
            self.stragglers.step()
        if self.reports_health(step):
            self._report_health(step)

    def validation(self, step: int, means: dict[str, float]) -> None:
        """Report a validation after `step` steps.

        means: "loss" in nats per token and, with tasks, "accuracy", the share of answer tokens predicted right.
        """
        loss = means["loss"]
        scalars = {f"validation/{name}": value for name, value in means.items()}
        line = f"step {step}/{self.config.training.steps} | validation loss {loss:.4f}"
        if "accuracy" in means:
            line += f" | accuracy {means['accuracy']:.3f}"
        if self.bytes is not None:
            scalars["validation/bits_per_byte"] = bits = self.bytes.bits_per_byte(loss)
            unigram = self.bytes.unigram_bits_per_byte
            line += f" | {bits:.3f} bits per byte (single-byte frequencies: {unigram:.3f})"
        self._log(line)
        self._write(step, scalars)

    def report(self, step: int, scalars: dict[str, float], line: str | None = None) -> None:
        """Report other scalars after `step` steps, the same on every rank, and log a line."""
        if line is not None:
            self._log(f"step {step}/{self.config.training.steps} | {line}")
        self._write(step, scalars)

    def close(self) -> None:
        """End the reports, wait for what trackers have not been sent yet, and log where TensorBoard events are."""
        for window in self.windows:
            window.close()
        for tracker in self.trackers:
            tracker.close()
        if self.events is not None:
            events = self.folder / TENSORBOARD
            command = shlex.join([find_program("tensorboard"), "--host", "127.0.0.1", "--logdir", str(events)])
            self._log(f"TensorBoard events: {events} ({command})")

    def _find_windows(self) -> list[ProfileWindow | MemoryWindow]:
        """Return the windows of steps to record on this rank."""
        monitor, on_gpu = self.config.monitor, self.device.type == "cuda"
        windows: list[ProfileWindow | MemoryWindow] = []
        if monitor.memory_steps is not None and not on_gpu:
            self._warn("monitor.memory_steps is ignored: there is no GPU whose memory could be recorded")
        if dist.get_rank() in monitor.profile_ranks:
            if monitor.memory_steps is not None and on_gpu:
                windows.append(MemoryWindow(monitor.memory_steps, self.folder))
            if monitor.profile_steps is not None:
                windows.append(ProfileWindow(monitor.profile_steps, self.folder, on_gpu))
        return windows

    def _report_health(self, step: int) -> None:
        self._write(step, collect_health(self.config.model, self.model_chunks, self.groups, self.device.type))
        if self.stragglers is not None:
            scalars, warning = self.stragglers.report()
            self._write(step, scalars)
            if warning is not None:
                self._warn(f"step {step}/{self.config.training.steps} | {warning}")

    def _compare_replicas(self, step: int) -> None:
        found = compare_replicas(self.model_chunks, self.groups.dp_cp)
        # Each group of replicas holds other weights.
        if found is not None and self.groups.dp_cp.rank() == 0:
            logger.error("step %d/%d | replicas differ: %s", step, self.config.training.steps, found)

    def _warn_of_spikes(self, step: int, loss: float, grad_norm: float) -> None:
        if self.spikes is not None:
            watched = {"loss": loss} if self.watches_loss else {}
            for text in self.spikes.check({**watched, "grad norm": grad_norm}):
                self._warn(f"step {step}/{self.config.training.steps} | SPIKE: {text}")

    def _log(self, line: str) -> None:
        if self.is_writer:
            logger.info(line)

    def _warn(self, line: str) -> None:
        if self.is_writer:
            logger.warning(line)

    def _write_settings(self) -> None:
        with self.settings_output.attempt():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self.folder / CONFIG, self.settings.encode())

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars on rank 0, and the settings where they are missing, as after the folder was moved."""
        if self.is_writer and (self.settings_output.is_failing or not (self.folder / CONFIG).is_file()):
            self._write_settings()
        if not self.is_writer or not scalars:
            return
        with self.metrics_output.attempt():
            self.metrics.write(step, scalars)
        if self.events is not None:
            with self.events_output.attempt():
                self.events.write(step, scalars)
        for tracker in self.trackers:
            tracker.write(step, scalars)


def bytes_of_validation(config: RunConfig) -> BytesOfTokens | None:
    """Return what turns the validation loss into bits per byte; None where a file does not say it, and for tasks.

    A held-out part of the training files is taken to be like the whole of them.
    """
    blend = config.data.validation or (config.data.train if config.data.validation_share else [])
    files = [(None if source.prefix is None else read_metadata(source.prefix), source.weight) for source in blend]
    known = [(metadata, weight) for metadata, weight in files if metadata is not None]
    return BytesOfTokens.of_blend(known) if known and len(known) == len(files) else None
