"""A whole training run: from the settings to the last checkpoint."""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sse.config import RunConfig
from megatron_sse.data import build_data_iterators
from megatron_sse.data.iterators import ValidationFactory
from megatron_sse.model import build_model
from megatron_sse.monitor import Monitor
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import init_groups, init_process_group
from megatron_sse.training.checkpoint import checkpoint_folder, find_checkpoint, load_checkpoint, save_checkpoint
from megatron_sse.training.optimizer import build_optimizer, set_learning_rate
from megatron_sse.training.schedule import learning_rate
from megatron_sse.training.step import StepResult, Trainer, wrap_model

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


class NonFiniteError(Exception):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Signals:
    """SIGTERM asks for an end after the running step; SIGINT ends the run at once."""

    def __init__(self) -> None:
        self.terminate = False
        self.interrupt = False
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminate = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupt = True
        raise KeyboardInterrupt

    def any_terminates(self, device: Device) -> bool:
        """Whether some rank was asked to end; the same answer on all ranks."""
        asked = torch.tensor([self.terminate], dtype=torch.int, device=device.type)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def train(config: RunConfig) -> int:
    """Run the training that `config` describes in this process and its peers; returns the exit code.

    0: all steps done, or SIGTERM and saved; 1: too many steps were not finite; 130: SIGINT, nothing saved. Raises
    UserError, before any process group exists, where there is nothing to resume from.
    """
    resume = find_checkpoint(config)
    signals = Signals()
    try:
        device = setup_device(int(os.environ.get("LOCAL_RANK", 0)))
        init_process_group(device)
        parallel = config.parallel
        groups = init_groups(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
        Run(config, groups, device, resume).run(signals)
    except NonFiniteError as error:
        logger.error("%s", error)
        return 1
    # When a peer was interrupted first, the collective that waits for it fails with an error of its own.
    except (KeyboardInterrupt, RuntimeError):
        if not signals.interrupt:
            raise
        if dist.get_rank() == 0:
            logger.error("interrupted; nothing saved since the last checkpoint")
        return EXIT_INTERRUPTED
    dist.destroy_process_group()
    return 0


class Run:
    """The parts of a run on this rank, and its place in it."""

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection, device: Device, resume: Path | None) -> None:
        self.config, self.groups, self.device = config, groups, device
        chunks = wrap_model(config, build_model(config, groups, device), groups)
        self.trainer = Trainer(config, groups, chunks, build_optimizer(config, chunks, groups))
        self.first_step, self.consumed_samples = 1, 0
        if resume is not None:
            steps, self.consumed_samples = load_checkpoint(resume, chunks, self.trainer.optimizer, groups)
            self.first_step = steps + 1
            logger.info("resumed from %s: %d steps done", resume, steps)
        self.skipped_in_a_row = 0
        self.monitor = Monitor(config, groups, chunks, device)

    def run(self, signals: Signals) -> None:
        """Train to the last step or to SIGTERM, validate on the way, save at the end."""
        training = self.config.training
        batches, make_validation = build_data_iterators(
            self.config, self.groups, self.consumed_samples, self.device.type
        )
        step = self.first_step - 1
        while step < training.steps and not signals.any_terminates(self.device):
            step += 1
            started = time.perf_counter()
            set_learning_rate(self.trainer.optimizer, rate := self.learning_rate(step))
            self._seed(step)
            result = self.trainer.train_step(batches)
            self.consumed_samples += training.global_batch_size
            self._report(step, result, rate, time.perf_counter() - started)
            due = training.validation_interval and step % training.validation_interval == 0
            if make_validation is not None and (due or step == training.steps):
                self._validate(step, make_validation)
        if step >= self.first_step:
            save_checkpoint(
                checkpoint_folder(self.config),
                step,
                self.consumed_samples,
                self.trainer.chunks,
                self.trainer.optimizer,
                self.groups,
            )
        elif step >= training.steps and dist.get_rank() == 0:
            logger.warning("nothing to do: %d of %d steps were done before", step, training.steps)
        self.monitor.close()

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step of this run."""
        return learning_rate(self.config.optimizer, step, self.config.training.steps)

    def _seed(self, step: int) -> None:
        # Random numbers of a step (dropout) depend on the step and rank alone: a resumed run draws the same.
        rank = self.groups.pp.rank() * self.groups.dp.size() + self.groups.dp.rank()
        model_parallel_cuda_manual_seed(self.config.training.seed + 100_003 * step + 1_009 * rank)

    def _report(self, step: int, result: StepResult, rate: float, seconds: float) -> None:
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        self.monitor.step(step, result.losses, rate, result.grad_norm, tokens, seconds, result.skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise NonFiniteError(
                f"training.max_skipped_steps: the loss or the gradient norm was not finite in {self.skipped_in_a_row} "
                f"steps in a row (the last was step {step}), stopped without saving; a lower optimizer.learning_rate "
                f"or a longer optimizer.warmup_steps may help"
            )

    def _validate(self, step: int, make_validation: ValidationFactory) -> None:
        self.monitor.validation(step, self.trainer.validate(make_validation()))
