"""What a run shows of itself: a line per step, TensorBoard scalars, and the settings that it used."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.tensorboard import SummaryWriter

from megatron_sse.config import RunConfig
from megatron_sse.data.metadata import read_metadata
from megatron_sse.monitor.flops import peak_flops, train_flops_per_token
from megatron_sse.monitor.health import collect_health
from megatron_sse.monitor.line import Progress
from megatron_sse.parallel.device import Device

logger = logging.getLogger(__name__)


class Monitor:
    """Reports a run. Every rank has one and calls step, in which layers of other ranks are read; rank 0 speaks."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        model_chunks: list[torch.nn.Module],
        device: Device,
    ):
        self.config = config
        self.groups = groups
        self.model_chunks = model_chunks
        self.device = device
        self.folder = Path(config.monitor.folder)
        self.is_writer = all(group.rank() == 0 for group in (groups.tp, groups.pp, groups.dp))
        self.num_processes = groups.tp.size() * groups.pp.size() * groups.dp.size()
        self.flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)
        self.peak_flops = peak_flops(device.description)
        self.metadata = read_metadata(config.data.validation) if config.data.validation else None
        # Since the last line; and the mean time of a step, in which the last steps weigh most.
        self.tokens, self.seconds = 0, 0.0
        self.mean_seconds: float | None = None
        self.writer: SummaryWriter | None = None
        if self.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(config.to_yaml())
            if config.monitor.tensorboard:
                self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def step(
        self,
        step: int,
        losses: dict[str, float],
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        skipped: bool = False,
    ) -> None:
        """Report step `step`, counted from 1.

        losses: "loss" and, with SSE layers, "balance_loss" without its coefficient, the same on every rank.
        tokens: of the global batch. seconds: that the step took. skipped: the optimizer did not step,
        on any rank.
        """
        self.tokens += tokens
        self.seconds += seconds
        self.mean_seconds = seconds if self.mean_seconds is None else 0.9 * self.mean_seconds + 0.1 * seconds
        monitor, steps = self.config.monitor, self.config.training.steps
        if step % monitor.log_interval == 0 or step == steps or skipped:
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
                skipped=skipped,
            )
            self.tokens, self.seconds = 0, 0.0
            self._log(progress.line())
            self._write(step, progress.scalars())
        if step % monitor.health_interval == 0:
            self._write(step, collect_health(self.config.model, self.model_chunks, self.groups, self.device.type))

    def validation(self, step: int, loss: float) -> None:
        """Report the validation loss in nats per token after `step` steps."""
        scalars = {"validation/loss": loss}
        line = f"step {step}/{self.config.training.steps} | validation loss {loss:.4f}"
        if self.metadata is not None:
            scalars["validation/bits_per_byte"] = bits = self.metadata.bits_per_byte(loss)
            unigram = self.metadata.unigram_bits_per_byte
            line += f" | {bits:.3f} bits per byte (single-byte frequencies: {unigram:.3f})"
        self._log(line)
        self._write(step, scalars)

    def close(self) -> None:
        """End of the run: say where things are."""
        if self.writer is not None:
            self.writer.close()
            self._log(f"TensorBoard events: {self.folder}/tensorboard (tensorboard --logdir {self.folder}/tensorboard)")
        if (self.folder / "checkpoints").is_dir():
            self._log(f"checkpoint: {self.folder}/checkpoints (the same command with more training.steps goes on)")

    def _log(self, line: str) -> None:
        if self.is_writer:
            logger.info(line)

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
