"""torch's index of a checkpoint (.metadata), which lists tensors and their files. It is a pickle, read with care."""

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_sse.checkpoint.names import INDEX

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


class IndexRefusedError(Exception):
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
    try:
        index = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except IndexRefusedError as refused:
        raise IndexRefusedError(f"{path}: refused, {refused}") from None
    except Exception as error:
        raise IndexRefusedError(f"{path}: cannot be read ({' '.join(repr(error).split())})") from None
    if not isinstance(index, Metadata):
        raise IndexRefusedError(f"{path}: refused, it is not an index of tensors")
    objects = sorted(index.state_dict_metadata.keys() - tensors_of(index).keys())
    if objects:
        raise IndexRefusedError(f"{path}: refused, it lists pickled objects ({objects[0]})")
    return index


def tensors_of(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the tensors that an index lists, by key."""
    described = index.state_dict_metadata
    return {key: entry for key, entry in described.items() if isinstance(entry, TensorStorageMetadata)}
