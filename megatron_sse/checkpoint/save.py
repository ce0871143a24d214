"""Saving: all ranks plan together, each writes its file in the background, and rank 0 completes the checkpoint."""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.checkpoint.data import describe_place
from megatron_sse.checkpoint.folders import checkpoint_folder, make_partial, promote, prune, step_folder
from megatron_sse.checkpoint.manifest import FileEntry, Manifest, describe_files
from megatron_sse.checkpoint.names import COMMON, DATA, TOKENIZER_FILES, TOKENS
from megatron_sse.checkpoint.shards import ShardWriter, Staging
from megatron_sse.checkpoint.state import find_not_finite, get_num_steps, is_distributed, model_state, optimizer_state
from megatron_sse.config import RunConfig, StageRun
from megatron_sse.data.tokenizer import END_OF_DOCUMENT, VOCAB_SIZE
from megatron_sse.durable import fsync
from megatron_sse.errors import describe_error
from megatron_sse.installed import versions
from megatron_sse.lease import Lease
from megatron_sse.parallel.collectives import gather_weights
from megatron_sse.run_folder import CONFIG

logger = logging.getLogger(__name__)

# The content of TOKENS where texts are generated while training, so that there is no token file.
BYTE_TOKENS = {"tokenizer": "bytes", "vocab_size": VOCAB_SIZE, "end": END_OF_DOCUMENT}


class SaveError(Exception):
    """An error for a checkpoint that was not saved, raised on all ranks; earlier ones are unchanged. One line."""


@dataclass
class _Save:
    """A save in progress to the folder `partial`.

    config, data: those of its step; the next stage may have begun when it is complete.
    """

    config: RunConfig
    data: dict[str, Any]
    partial: Path
    step: int
    consumed_samples: int
    finite: bool
    common: dict[str, Any]
    shards: ShardWriter
    started: float
    blocked: float


class Saver:
    """Saving of a run's state. Every rank has one and calls its methods in the same order.

    config, chunks, optimizer, groups: those of the run. lease: on its folder, on rank 0; without it nothing is written.
    At most one save is in progress.
    """

    def __init__(
        self,
        config: RunConfig,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        lease: Lease | None = None,
    ):
        # Content of the tokenizer's files by their names in a checkpoint, where no training file has them beside it.
        self.tokenizer: dict[str, bytes] = {}
        self.config, self.chunks, self.optimizer, self.groups = config, chunks, optimizer, groups
        self.folder, self.lease = checkpoint_folder(config), lease
        self.newest: int | None = None
        self._save: _Save | None = None
        self._staging: Staging = {}
        self._checked = False
        # On rank 0: a checkpoint from which no step was taken yet.
        self._unproven: Path | None = None
        self._taken = 0
        self._stage: StageRun | None = None
        self._data: dict[str, Any] = {}

    def start_stage(self, stage: StageRun, data: dict[str, Any]) -> None:
        """Save with a stage's settings, and this description of its data for resumed runs to compare, from now on."""
        self.config, self._stage, self._data = stage.config, stage, data

    @property
    def is_under_way(self) -> bool:
        """Whether a save was started and not yet finished; the same on every rank."""
        return self._save is not None

    def is_writing(self) -> bool:
        """Check whether this rank is still writing its file."""
        return self._save is not None and not self._save.shards.is_done()

    def start(self, step: int, consumed_samples: int, background: bool, finite: bool = True) -> None:
        """Start to save the state after `step` steps. Raises SaveError, on every rank; also for weights that are not
        finite, from which no run could be continued.

        finite: whether loss and gradient norm of the last step were finite; otherwise a resumed run does not use the
        checkpoint by itself.
        background: copy the state, so that training may continue while the copy is written; without it the state must
        not change before finish() returns.
        """
        assert self._save is None
        started = time.perf_counter()
        gather_weights(self.chunks)
        wrong = find_not_finite(self.chunks, self.optimizer)
        _agree(wrong and f"not finite: {wrong}")
        partial = self._make_folder(step)
        model = model_state(self.chunks, self.groups)
        common = {"step": step, "consumed_samples": consumed_samples, "optimizer_step": get_num_steps(self.optimizer)}
        # Megatron-Core checks once that the ranks' parts make up complete tensors; the parts stay the same.
        parts, _ = save_preprocess(
            {**model, "optimizer": optimizer_state(model, self.optimizer)}, validate_access_integrity=not self._checked
        )
        self._checked = True
        shards = ShardWriter(parts, partial)
        if background:
            shards.stage(self._staging)
            shards.start()
        else:
            shards.write()
        now = time.perf_counter()
        self._save = _Save(
            self.config,
            self._describe_data(step, consumed_samples),
            partial,
            step,
            consumed_samples,
            finite,
            common,
            shards,
            now,
            now - started,
        )

    def _describe_data(self, step: int, consumed_samples: int) -> dict[str, Any]:
        if self._stage is None:
            return {}
        rate = self.optimizer.param_groups[0]["lr"]
        return self._data | describe_place(self._stage, step, consumed_samples, rate)

    def finish(self) -> None:
        """Wait until all ranks have written, and complete the checkpoint. Raises SaveError, on every rank."""
        save, self._save = self._save, None
        assert save is not None
        begun = time.perf_counter()
        save.shards.wait()
        written = (save.shards.results, save.shards.entries, save.shards.error)
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(written, gathered)
        _agree(None if gathered is None else self._complete(save, gathered))
        self.newest = save.step
        now = time.perf_counter()
        if dist.get_rank() == 0:
            blocked, total = save.blocked + now - begun, save.blocked + now - save.started
            path = step_folder(self.folder, save.step)
            logger.info("checkpoint saved: %s (%.1f s, training paused for %.1f s)", path, total, blocked)
            if save.finite:
                # Until a step was taken from it, it may turn out to be of no use; the one before stays as well.
                self._unproven = path
                self._prune(path, least=2)
                self.prove(self._taken)

    def prove(self, step: int) -> None:
        """Note that step `step` was taken: its loss was finite, so that the checkpoint before it is of use."""
        self._taken = step
        if self._unproven is not None and self.newest is not None and step > self.newest:
            self._prune(self._unproven, least=1)
            self._unproven = None

    def abandon(self) -> None:
        """Abandon a save in progress on this rank, so that the process can end."""
        if self._save is not None:
            self._save.shards.abandon()

    def _make_folder(self, step: int) -> Path:
        """Return the folder to write a checkpoint to, which rank 0 makes. Raises SaveError, on every rank."""
        made: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                self._check_lease()
                made[0] = make_partial(self.folder, step)
            except OSError as error:
                made[1] = describe_error(error)
        dist.broadcast_object_list(made)
        partial, failed = made
        if failed is not None:
            raise _unsaved(failed)
        return partial

    def _check_lease(self) -> None:
        """Raise OSError where another run has taken the folder over, on rank 0."""
        if self.lease is not None:
            self.lease.check()

    def _complete(self, save: _Save, gathered: list[Any]) -> str | None:
        """Write the remaining files and rename the folder, on rank 0; return what went wrong, or None."""
        partial = save.partial
        failed = next((f"{error} (rank {rank})" for rank, (_, _, error) in enumerate(gathered) if error), None)
        if failed is None:
            try:
                save.shards.finish_index([results for results, _, _ in gathered])
                torch.save(save.common, partial / COMMON)
                save_config(CheckpointingConfig("torch_dist", 1), str(partial))
                _write_config(save, partial, self.tokenizer)
                known = {name: entry for _, entries, _ in gathered for name, entry in entries.items()}
                self._manifest(save, describe_files(partial, known)).write(partial)
                self._check_lease()
                promote(partial, step_folder(self.folder, save.step), save.finite)
            # torch.save turns an OSError into a RuntimeError.
            except (OSError, RuntimeError) as error:
                failed = describe_error(error)
        if failed is not None:
            shutil.rmtree(partial, ignore_errors=True)
        return failed

    def _manifest(self, save: _Save, files: dict[str, FileEntry]) -> Manifest:
        parallel, groups = self.config.parallel, self.groups
        layout = {
            "world": dist.get_world_size(),
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "data": groups.dp.size(),
            "distributed_optimizer": is_distributed(self.optimizer),
        }
        return Manifest(save.step, save.consumed_samples, True, layout, versions(), files, save.finite)

    def _prune(self, saved: Path, least: int) -> None:
        keep_last = self.config.checkpoint.keep_last
        if keep_last is None:
            return
        try:
            self._check_lease()
            prune(self.folder, max(keep_last, least), saved)
        except OSError as error:
            logger.warning("old checkpoints were not deleted: %s", describe_error(error))


def _write_config(save: _Save, folder: Path, tokenizer: dict[str, bytes]) -> None:
    (folder / CONFIG).write_text(save.config.to_yaml())
    if save.data:
        (folder / DATA).write_text(json.dumps(save.data, indent=2) + "\n")
    # The tokenizer's files, where the first token file has them.
    prefix = next((source.prefix for source in save.config.data.train if source.prefix), None)
    for suffix, name in TOKENIZER_FILES.items():
        beside = Path(f"{prefix}{suffix}")
        if prefix is not None and beside.is_file():
            shutil.copyfile(beside, folder / name)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    is_described = any((folder / name).exists() for name in TOKENIZER_FILES.values())
    if not is_described and any(source.needle is not None for source in save.config.data.train):
        (folder / TOKENS).write_text(json.dumps(BYTE_TOKENS, indent=2) + "\n")
    for path in folder.iterdir():
        fsync(path)


def _agree(failed: str | None) -> None:
    """Raise SaveError on every rank where one rank has failed."""
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, failed)
    first = next((text for text in every if text is not None), None)
    if first is not None:
        raise _unsaved(first)


def _unsaved(reason: str) -> SaveError:
    return SaveError(f"checkpoint not saved: {reason}; earlier checkpoints are unchanged")
