"""torch's index of a checkpoint (.metadata), which lists tensors and their files. It is a pickle, read with care."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sse.checkpoint.names import INDEX
from megatron_sse.errors import UserError
from megatron_sse.reading import read_bytes

# That of a run of thousands of ranks has some hundred MiB.
_MAX_BYTES = 1 << 31
_FILE_NAME = re.compile(r"\.?[\w-][\w.-]*")

# The only classes that an index of tensors needs. All of them just hold values.
_DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
_ALLOWED = {
    "torch": {"Size", *_DTYPES.split()},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class IndexRefusedError(UserError):
    """An error for a file that is not an index, or needs more than the classes above. One line, with the file."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise IndexRefusedError(f"it asks for {module}.{name}, which no index of tensors needs")


def read_index(folder: Path) -> Metadata:
    """Read the index of a checkpoint without running any code that its pickle asks for.

    Raises IndexRefusedError, also where the index lists pickled objects: torch would unpickle those without a check.
    """
    path = folder / INDEX
    content = read_bytes(path, _MAX_BYTES)
    try:
        index = _Unpickler(io.BytesIO(content)).load()
    except IndexRefusedError as refused:
        raise IndexRefusedError(f"{path}: refused, {refused}") from None
    except Exception as error:
        raise IndexRefusedError(f"{path}: cannot be read ({' '.join(repr(error).split())})") from None
    if not isinstance(index, Metadata):
        raise IndexRefusedError(f"{path}: refused, it is not an index of tensors")
    if wrong := _find_wrong(index):
        raise IndexRefusedError(f"{path}: refused, {wrong}")
    return index


def _find_wrong(index: Metadata) -> str | None:
    """Return what is wrong with the values of an index; unpickling gives each its class, but not its content."""
    try:
        described, places = index.state_dict_metadata, index.storage_data or {}
        if not isinstance(described, dict) or not all(isinstance(key, str) for key in described):
            return "it does not list tensors by name"
        if objects := sorted(described.keys() - tensors_of(index).keys()):
            return f"it lists pickled objects ({objects[0][:80]!r})"
        wrong = next((key for key, entry in tensors_of(index).items() if not _is_tensor(entry)), None)
        if wrong is not None:
            return f"its description of {wrong[:80]!r} has wrong values"
        if not isinstance(places, dict) or not all(map(_is_place, places.items())):
            return "its places of tensors have wrong values"
        parts = {(key, chunk.offsets) for key, entry in tensors_of(index).items() for chunk in entry.chunks}
        if absent := parts - {(place.fqn, place.offset) for place in places}:
            return f"it has no place for {min(absent)[0][:80]!r}"
    # A class without the values that it should have.
    except (AttributeError, TypeError):
        return "it lacks values"
    return None


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    size, chunks = entry.size, entry.chunks
    if not _is_size(size) or not isinstance(entry.properties, TensorProperties) or not isinstance(chunks, list):
        return False
    if not isinstance(entry.properties.dtype, torch.dtype):
        return False
    return all(isinstance(chunk, ChunkStorageMetadata) and _is_inside(chunk, size) for chunk in chunks)


def _is_inside(chunk: ChunkStorageMetadata, size: torch.Size) -> bool:
    offsets, sizes = chunk.offsets, chunk.sizes
    if not _is_size(offsets) or not _is_size(sizes) or not len(offsets) == len(sizes) == len(size):
        return False
    return all(first + number <= end for first, number, end in zip(offsets, sizes, size, strict=True))


def _is_place(item: tuple[Any, Any]) -> bool:
    index, place = item
    return (
        isinstance(index, MetadataIndex)
        and isinstance(index.fqn, str)
        and _is_size(index.offset)
        and isinstance(place, _StorageInfo)
        and isinstance(place.relative_path, str)
        and _FILE_NAME.fullmatch(place.relative_path) is not None
        and all(type(number) is int and 0 <= number < 1 << 63 for number in (place.offset, place.length))
        # Compression and the like, whose code torch would look up by name.
        and not getattr(place, "transform_descriptors", None)
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def tensors_of(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the tensors that an index lists, by key."""
    described = index.state_dict_metadata
    return {key: entry for key, entry in described.items() if isinstance(entry, TensorStorageMetadata)}
