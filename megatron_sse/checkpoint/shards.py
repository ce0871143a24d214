"""Writing this rank's tensors to its file of a checkpoint in torch's distributed format, now or in the background."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sse.checkpoint.manifest import FileEntry
from megatron_sse.durable import HashedFile, hashed_file

# Copies of the tensors in host memory: the background thread writes them while training changes the originals.
Staging = dict[MetadataIndex, Tensor]

_SECONDS_TO_STOP = 60.0


class _Planner(MCoreSavePlanner):
    """Megatron-Core's planner, which gives the writer the staged copy of a tensor where there is one."""

    def __init__(self) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.staged: Staging = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        staged = self.staged.get(write_item.index)
        return super().resolve_data(write_item) if staged is None else staged


class _HashingFileSystem(FileSystem):
    """A file system that hashes what is written, and waits until it is on the disk."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}
        self.stop = False

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        stream: HashedFile
        with hashed_file(Path(path), lambda: self.stop) as stream:
            yield stream
        self.entries[Path(path).name] = FileEntry(stream.size, stream.digest.hexdigest())


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path):
        # Not sync_files: hashed_file waits for the disk.
        super().__init__(folder, sync_files=False)
        self.fs: _HashingFileSystem = _HashingFileSystem()

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Keep the plan; Megatron-Core calls this at the end of planning."""
        self.plan = plan


class ShardWriter:
    """A plan of a checkpoint's files over all ranks, and the writer of this rank's file.

    Making one is collective over all ranks, in the main thread. index: of the full checkpoint, on rank 0; finish_index
    adds where the tensors are, from the results of all ranks.
    """

    def __init__(self, state: dict[str, Any], folder: Path):
        self.planner = _Planner()
        self.writer = _Writer(folder)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), self.writer, planner=self.planner)
        self.index: Metadata | None = planned[0][1]
        self.results: list[WriteResult] = []
        self.error: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def entries(self) -> dict[str, FileEntry]:
        """The files written so far."""
        return self.writer.fs.entries

    def stage(self, staging: Staging) -> None:
        """Copy all tensors to `staging` in host memory, whose buffers are reused from save to save."""
        for item in self.writer.plan.items:
            tensor = self.planner.resolve_data(item)
            buffer = staging.get(item.index)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
                staging[item.index] = buffer
            buffer.copy_(tensor, non_blocking=True)
            self.planner.staged[item.index] = buffer
        torch.cuda.synchronize()

    def start(self) -> None:
        """Write in a background thread, which ends with the process, so that nothing outlives a failed run."""
        self._thread = threading.Thread(target=self.write, daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write this rank's file, if it has anything to write; after a failure `error` says what went wrong."""
        if not self.writer.plan.items:
            return
        try:
            self.results = self.writer.write_data(self.writer.plan, self.planner).value()
        except OSError as error:
            self.error = f"{error.filename or self.writer.path}: {error.strerror}"
        except Exception as error:
            self.error = f"{self.writer.path}: {error!r}"

    def is_done(self) -> bool:
        """Check whether the background thread has ended."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the background thread."""
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """Stop writing. If the process ended while the thread is inside torch's writer, it would abort."""
        self.writer.fs.stop = True
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_STOP)

    def finish_index(self, results: list[list[WriteResult]]) -> None:
        """Write the index of all ranks' tensors, on rank 0."""
        assert self.index is not None
        self.writer.finish(self.index, results)
