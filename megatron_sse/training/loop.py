"""A training run, from the settings to the last checkpoint."""

import logging
import math
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sse.checkpoint.data import check_same_data, warn_of_changed_schedule
from megatron_sse.checkpoint.folders import (
    check_writable,
    checkpoint_folder,
    describe_finished,
    describe_resume,
    find_checkpoints,
    find_weights,
    mark_unusable,
    step_folder,
)
from megatron_sse.checkpoint.load import load_checkpoint, load_weights
from megatron_sse.checkpoint.save import SaveError, Saver
from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.config import RunConfig, StageRun, describe_speedups, plan_stages, stage_of_step
from megatron_sse.data.batch import Batch
from megatron_sse.data.fingerprint import describe_data
from megatron_sse.data.iterators import ValidationFactory, build_data_iterators
from megatron_sse.errors import INTERRUPT_EXIT, NOT_FINITE_EXIT, SharedUserError, UserError
from megatron_sse.interrupts import ending_at_once
from megatron_sse.lease import Lease
from megatron_sse.model import build_model
from megatron_sse.monitor.memory import is_out_of_memory, report_out_of_memory
from megatron_sse.monitor.monitor import Monitor
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import init_groups, init_process_group, this_rank
from megatron_sse.training.faults import is_lost_peer, leave_for_peers, name_lost_peers, seconds_since_launch
from megatron_sse.training.optimizer import build_optimizer, set_learning_rate
from megatron_sse.training.schedule import learning_rate
from megatron_sse.training.step import StepResult, Trainer, wrap_model

logger = logging.getLogger(__name__)


class UselessRunError(Exception):
    """A run that must not go on and that a restart would not help; it is not saved. One line."""


class NonFiniteError(UselessRunError):
    """An error for too many skipped steps in a row."""


class Signals:
    """Reasons to end a run early: SIGTERM or the time limit end it after the current step, SIGINT at once.

    minutes: the time limit, counted from the launch; None for no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.terminate = False
        self.interrupt = False
        self._ends_at_once = False
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes - seconds_since_launch()
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminate = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupt = True
        if not self._ends_at_once:
            raise KeyboardInterrupt

    @contextmanager
    def while_meeting(self) -> Iterator[None]:
        """Let SIGINT end the process at once in the block, in which torch may wait for other processes for minutes."""
        self._ends_at_once = True
        try:
            with ending_at_once(report_interrupt):
                yield
        finally:
            self._ends_at_once = False

    def share(self, device: Device, writing: bool) -> tuple[str | None, bool]:
        """Return the reason to end (or None), and whether any rank is still `writing` a checkpoint; the same on all."""
        mine = [self.terminate, time.monotonic() >= self.end, writing]
        flags = torch.tensor(mine, dtype=torch.int, device=device.type)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        terminate, time_is_up, any_writes = flags.tolist()
        reason = "SIGTERM" if terminate else "checkpoint.stop_after_minutes" if time_is_up else None
        return reason, bool(any_writes)


def train(config: RunConfig, lease: Lease | None = None, make_run: "type[Run] | None" = None) -> int:
    """Run the training that `config` describes in this process and its peers; return the exit code.

    lease: on the run folder, on rank 0. make_run: another kind of run than Run.

    0: all steps done, or ended by SIGTERM or the time limit, and saved; 1: the last checkpoint could not be saved, or
    another process was lost; 3: too many steps were not finite, or going on is of no use; 130: SIGINT, nothing saved.
    Raises UserError where a setting turns out to be wrong, such as a checkpoint.resume without a checkpoint (before any
    process group exists).
    """
    candidates, weights = find_checkpoints(config), find_weights(config)
    check_writable(checkpoint_folder(config), lease)
    signals = Signals(config.checkpoint.stop_after_minutes)
    run = None
    try:
        parallel = config.parallel
        device = setup_device(int(os.environ.get("LOCAL_RANK", 0)), parallel.tensor)
        sizes = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
        with signals.while_meeting():
            init_process_group(device, parallel.timeout_minutes)
            groups = init_groups(*sizes, timeout_minutes=parallel.timeout_minutes)
        hashes = config.checkpoint.verify == "hashes"
        resume = first_intact(candidates, hashes)
        if resume is None:
            weights = first_intact([] if weights is None else [weights], hashes, "checkpoint.load_weights")
        run = (make_run or Run)(config, groups, device, resume, weights, lease)
        run.run(signals)
    except (UselessRunError, SaveError) as error:
        if this_rank() == 0:
            logger.error("%s", error)
            logger.info("%s", describe_resume(config))
        return NOT_FINITE_EXIT if isinstance(error, UselessRunError) else 1
    except SharedUserError:
        raise
    except UserError as error:
        leave_for_peers(error)
        raise
    except (KeyboardInterrupt, Exception) as error:
        # When a peer was interrupted first, the collective that waits for it fails with an error of its own.
        if signals.interrupt:
            report_interrupt()
            return INTERRUPT_EXIT
        if is_lost_peer(error):
            logger.error("%s", name_lost_peers(error))
            return 1
        traceback.print_exception(error)
        if is_out_of_memory(error):
            report_out_of_memory(error, config)
        leave_for_peers(error)
        return 1
    finally:
        if run is not None:
            run.saver.abandon()
    dist.destroy_process_group()
    return 0


def report_interrupt() -> None:
    """Log, on rank 0, that the run was interrupted."""
    if this_rank() == 0:
        logger.error("interrupted; nothing saved since the last checkpoint")


class Run:
    """The parts of a run on this rank, and its progress."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        device: Device,
        resume: Path | None,
        weights: Path | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.config, self.groups, self.device, self.resume = config, groups, device, resume
        self.stages = plan_stages(config)
        if resume is not None:
            check_same_data(resume, config, self.stages)
        chunks = wrap_model(config, build_model(config, groups, device), groups)
        logger.info("%s", describe_speedups(config, device.type == "cuda", groups.dp_cp.size()))
        self.trainer = Trainer(config, groups, chunks, build_optimizer(config, chunks, groups))
        self.first_step, self.consumed_samples = 1, 0
        if resume is not None:
            steps, self.consumed_samples = load_checkpoint(resume, config, chunks, self.trainer.optimizer, groups)
            self.first_step = steps + 1
            logger.info("resumed from %s: %d steps done", resume, steps)
            warn_of_changed_schedule(resume, stage_of_step(self.stages, steps).config, self.learning_rate(steps))
        elif weights is not None:
            load_weights(weights, config, chunks, self.trainer.optimizer, groups)
            logger.info("starting from the weights of %s", weights)
        self.stage = stage_of_step(self.stages, self.first_step)
        self.saver = Saver(config, chunks, self.trainer.optimizer, groups, lease)
        self.skipped_in_a_row = 0
        self.monitor = Monitor(config, groups, chunks, device, self.first_step)

    def run(self, signals: Signals) -> None:
        """Train to the last step, or to a signal or the time limit; validate and save on the way, and save at the end.

        Raises SaveError where the last checkpoint could not be saved; failures of earlier ones are only logged.
        """
        training, checkpoint = self.config.training, self.config.checkpoint
        step, batches, make_validation = self.first_step - 1, None, None
        is_due = False
        while step < training.steps and not self._is_over(signals):
            step += 1
            logger.debug("step %d", step)
            if batches is None or step > self.stage.end:
                batches, make_validation = self._enter(stage_of_step(self.stages, step))
            self.advance(step, batches)
            due = training.validation_interval and step % training.validation_interval == 0
            if make_validation is not None and (due or step == training.steps):
                self._validate(step, make_validation)
            is_due |= bool(checkpoint.interval) and step % checkpoint.interval == 0
            if is_due and step < training.steps:
                is_due = not self._save(step, checkpoint.asynchronous)
        self._finish_save()
        if step >= self.first_step and self.saver.newest != step:
            self._save_last(step)
        elif step < self.first_step and step >= training.steps and dist.get_rank() == 0:
            logger.warning("nothing to do: %s", describe_finished(training.steps))
        self.monitor.close()
        if dist.get_rank() == 0:
            logger.info("%s", describe_resume(self.config))

    def advance(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Take step `step`, counted from 1, and report it."""
        self.monitor.before_step(step)
        started = time.perf_counter()
        set_learning_rate(self.trainer.optimizer, rate := self.learning_rate(step))
        self._seed(step)
        self.trainer.measures_health = self.monitor.reports_health(step)
        self.trainer.before_update = self.monitor.comparison(step)
        result = self._take_step(step, batches)
        self.consumed_samples += self.stage.config.training.global_batch_size
        self._report(step, result, rate, time.perf_counter() - started)
        return result

    def _enter(self, stage: StageRun) -> tuple[Iterator[Batch], ValidationFactory | None]:
        """Switch to a stage's settings; return its training batches from here on, and its validation."""
        self.stage = stage
        self.trainer.start_stage(stage.config)
        self.monitor.start_stage(stage.config)
        self.saver.start_stage(stage, self._describe_data(stage))
        if len(self.stages) > 1:
            data, training = stage.config.data, stage.config.training
            logger.info(
                "stage %d of %d: steps %d to %d, %d sequences of %d tokens",
                *(stage.number + 1, len(self.stages), stage.first_step + 1, stage.end),
                *(training.global_batch_size, data.sequence_length),
            )
        consumed = max(0, self.consumed_samples - stage.first_sample)
        return build_data_iterators(stage, self.groups, consumed, self.device.type)

    def _describe_data(self, stage: StageRun) -> dict[str, Any]:
        """Return what checkpoints of the stage say of its data, to be compared on resume."""
        return describe_data(stage)

    def _take_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Train on the next global batch."""
        return self.trainer.train_step(batches)

    def _num_tokens(self) -> int:
        """Return the tokens of the last step's global batch."""
        settings = self.stage.config
        return settings.training.global_batch_size * settings.data.sequence_length

    def _is_over(self, signals: Signals) -> bool:
        reason, any_writes = signals.share(self.device, self.saver.is_writing())
        if not any_writes:
            self._finish_save()
        if reason is not None and dist.get_rank() == 0:
            logger.info("ending the run: %s", reason)
        return reason is not None

    def _save(self, step: int, background: bool) -> bool:
        """Save, unless the newest step was skipped: the state may be the cause. Return whether the save was tried."""
        if self.skipped_in_a_row:
            if self.skipped_in_a_row == 1 and dist.get_rank() == 0:
                logger.warning("no checkpoint after step %d, which was skipped: it is put off to the next one", step)
            return False
        if self.saver.is_under_way:
            logger.info("waiting for the previous checkpoint: writing one takes longer than checkpoint.interval")
        self._finish_save()
        try:
            self.saver.start(step, self.consumed_samples, background)
        except SaveError as error:
            self._report_unsaved(error)
        if not background:
            self._finish_save()
        return True

    def _save_last(self, step: int) -> None:
        """Save at the end. Raises SaveError."""
        finite = self.skipped_in_a_row == 0
        if not finite and dist.get_rank() == 0:
            logger.warning(
                "the last %d steps were skipped: the same command does not resume from the checkpoint after step %d",
                *(self.skipped_in_a_row, step),
            )
        self.saver.start(step, self.consumed_samples, background=False, finite=finite)
        self.saver.finish()

    def _finish_save(self) -> None:
        try:
            if self.saver.is_under_way:
                self.saver.finish()
        except SaveError as error:
            self._report_unsaved(error)

    def _report_unsaved(self, error: SaveError) -> None:
        # Not fatal: a later save may succeed. Only the last save of the run has to.
        if dist.get_rank() == 0:
            logger.error("%s; training continues", error)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this run."""
        stage = stage_of_step(self.stages, step)
        if stage.own_schedule:
            return learning_rate(stage.config.optimizer, step - stage.first_step, stage.steps)
        return learning_rate(self.config.optimizer, step, self.config.training.steps)

    def _seed(self, step: int) -> None:
        # A step's random numbers (dropout) depend only on step and rank, so that a resumed run draws the same.
        rank = self.groups.pp.rank() * self.groups.dp_cp.size() + self.groups.dp_cp.rank()
        model_parallel_cuda_manual_seed(self.config.training.seed + 100_003 * step + 1_009 * rank)

    def _report(self, step: int, result: StepResult, rate: float, seconds: float) -> None:
        skip = result.skip
        reason = None if skip is None else skip.reason
        self.monitor.step(step, result.losses, rate, result.grad_norm, self._num_tokens(), seconds, reason)
        if skip is None:
            self.skipped_in_a_row = 0
            self.saver.prove(step)
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.training.max_skipped_steps:
            self._give_up_checkpoint(step - self.skipped_in_a_row)
            raise NonFiniteError(
                f"training.max_skipped_steps: {self.skipped_in_a_row} steps in a row were skipped (the last was step "
                f"{step}: {skip.reason}), stopped without saving; {skip.advice}"
            )

    def _give_up_checkpoint(self, step: int) -> None:
        """Keep the checkpoint after `step`, from which no step could be taken, from being resumed from."""
        self._finish_save()
        path = step_folder(self.saver.folder, step)
        if dist.get_rank() == 0 and (self.saver.newest == step or path == self.resume):
            try:
                mark_unusable(path)
            except OSError as error:
                logger.warning("%s: every step from it was skipped; this cannot be noted (%s)", path, error.strerror)

    def _validate(self, step: int, make_validation: ValidationFactory) -> None:
        self.monitor.validation(step, self.trainer.validate(make_validation()))
