"""Reading and writing a checkpoint's model weights as full tensors, one at a time, without process groups.

What training saves at any layout can be read here, and training loads what is written here. Names are those of the
model's sharded state dict.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sse.checkpoint.index import read_index
from megatron_sse.checkpoint.manifest import (
    FileEntry,
    Manifest,
    describe_files,
    find_damage,
    read_manifest,
)
from megatron_sse.checkpoint.names import COMMON, OPTIMIZER
from megatron_sse.config import RunConfig
from megatron_sse.durable import HashedFile, hashed_file
from megatron_sse.errors import UserError
from megatron_sse.installed import versions
from megatron_sse.run_folder import CONFIG

# Largest size of a file, unless one tensor has more.
FILE_BYTES = 1 << 32


class Weights(Protocol):
    """Named full tensors, each loaded when `get` is called."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, name: str) -> torch.Size: ...

    def get(self, name: str) -> Tensor: ...


class CheckpointWeights:
    """The model weights of a checkpoint folder."""

    def __init__(self, folder: Path, index: Metadata):
        self.folder = folder
        self._places = index.storage_data
        self._tensors = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(OPTIMIZER)
        }

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def get(self, name: str) -> Tensor:
        """Return the full tensor, assembled from the parts that the ranks saved. Raises UserError."""
        entry = self._tensors[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            part = self._read(MetadataIndex(name, chunk.offsets))
            if part.shape != chunk.sizes or part.dtype != whole.dtype:
                raise UserError(f"{self.folder}: {name} is damaged: its file holds another tensor")
            whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return whole

    def _read(self, index: MetadataIndex) -> Tensor:
        place = self._places[index]
        path = self.folder / place.relative_path
        if path.parent != self.folder:
            raise UserError(f"{self.folder}: {index.fqn} points out of the folder, to {place.relative_path}")
        try:
            with path.open("rb") as file:
                view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                return torch.load(view, map_location="cpu", weights_only=True)
        # torch.load raises different errors, depending on where a file is damaged.
        except Exception as error:
            raise UserError(f"{path}: {index.fqn} cannot be read ({type(error).__name__})") from None


def read_weights(folder: Path, hashes: bool = True) -> CheckpointWeights:
    """Open the model weights of a checkpoint folder after checking its files' hashes or sizes. Raises UserError."""
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest, manifest.files, hashes)
    if damage:
        raise UserError(damage[0])
    return CheckpointWeights(folder, read_index(folder))


def write_weights(folder: Path, config: RunConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a checkpoint of model weights only into a folder; other files in there become part of it.

    tensors: names as in the model's sharded state dict, and full tensors; they are taken and written one by one.
    Raises OSError.
    """
    planner, writer, files = DefaultSavePlanner(), FileSystemWriter(folder, sync_files=False), _FileByFile()
    writer.fs = files
    index, results = Metadata({}), []
    with files:
        number, size = 0, 0
        for name, tensor in tensors:
            if size and size + tensor.nbytes > FILE_BYTES:
                number, size = number + 1, 0
            size += tensor.nbytes
            state = {name: tensor.detach().contiguous()}
            planner.set_up_planner(state, is_coordinator=True)
            [plan], described = create_default_global_save_plan([create_default_local_save_plan(state, True)])
            # A file is named after the rank that writes it, so file `number` is planned as rank `number`'s.
            plan = writer.prepare_global_plan([plan] * (number + 1))[number]
            results.append(writer.write_data(plan, planner).wait())
            index.state_dict_metadata |= described.state_dict_metadata
    with files:
        writer.finish(index, results)
    torch.save({"step": 0, "consumed_samples": 0}, folder / COMMON)
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    Manifest(0, 0, False, {"world": 1}, versions(), describe_files(folder, files.entries)).write(folder)


class _FileByFile(FileSystem):
    """A file system that keeps a file open over several calls, until another file is written or the block ends."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}
        self._path: Path | None = None

    def __enter__(self) -> None:
        self._open = ExitStack()

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        if self._path is not None:
            self.entries[self._path.name] = FileEntry(self._stream.size, self._stream.digest.hexdigest())
            self._path = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if Path(path) != self._path:
            self.__exit__()
            self._path = Path(path)
            self._stream: HashedFile = self._open.enter_context(hashed_file(self._path, lambda: False))
        yield _Rest(self._stream)


class _Rest(io.RawIOBase):
    """A view of an open file to write to; closing the view leaves the file open."""

    def __init__(self, file: HashedFile):
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()
