"""The manifest of a checkpoint: its description, and size and SHA-256 of every file.

It is written last: a folder without one is not a complete checkpoint.
"""

import json
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_sse.checkpoint.names import MANIFEST
from megatron_sse.durable import sha256_of, write_durably
from megatron_sse.errors import UserError
from megatron_sse.reading import NotFoundError, read_json

FORMAT = 1
# Files below this size are always hashed, even where only sizes are to be checked.
_SMALL = 1 << 20
_FileName = Annotated[str, Field(pattern=r"^\.?[\w-][\w.-]*$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class ManifestError(UserError):
    """An error for a manifest that is missing or cannot be read. One line, with the file."""


@dataclass(frozen=True)
class _Version:
    format: int


@dataclass(frozen=True)
class FileEntry:
    """A file's length in bytes and its SHA-256 as hexadecimal digits."""

    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    step, consumed_samples: steps and samples done when it was saved. optimizer: whether it holds the optimizer's state
    besides the weights. layout: sizes of the groups that saved it (world, tensor, pipeline, virtual_pipeline, context,
    data) and distributed_optimizer. versions: of megatron_sse, torch, megatron-core. finite: whether loss and gradient
    norm of the last step were finite, so that it was taken; versions that did not check this have true.
    """

    step: Count
    consumed_samples: Count
    optimizer: bool
    layout: dict[str, int | bool]
    versions: dict[str, str]
    files: dict[_FileName, FileEntry]
    finite: bool = True

    def write(self, folder: Path) -> None:
        """Write manifest.json durably."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        write_durably(folder / MANIFEST, text.encode() + b"\n")

    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises ManifestError where it is missing or cannot be read."""
    path = folder / MANIFEST
    try:
        version = read_json(path, _Version).format
        if version != FORMAT:
            raise ManifestError(f"{path}: got format {version}, allowed {FORMAT}")
        return read_json(path, Manifest)
    except NotFoundError as error:
        raise ManifestError(str(error)) from None
    except UserError as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(str(error)) from None


def describe_files(folder: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Return the entries of all files in a folder; those in `known` are not read again."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = known.get(path.name) or FileEntry(path.stat().st_size, sha256_of(path))
    return entries


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str], hashes: bool) -> list[str]:
    """Return what is wrong with these files of a checkpoint: one line for each, with the file's path.

    hashes: check those of all files; otherwise those of files below 1 MiB, and only the sizes of larger ones.
    """
    return [line for name in names for line in _find_damage_of(folder / name, manifest.files[name], hashes)]


def _find_damage_of(path: Path, entry: FileEntry, hashes: bool) -> list[str]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return [f"{path}: not a regular file"]
        size = status.st_size
        if size != entry.size:
            return [f"{path}: has {size} bytes, the manifest says {entry.size}"]
        if (hashes or size < _SMALL) and sha256_of(path) != entry.sha256:
            return [f"{path}: its SHA-256 is not the manifest's"]
    except FileNotFoundError:
        return [f"{path}: not found"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return []
