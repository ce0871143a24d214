"""The manifest of a checkpoint: its description, and size and SHA-256 of every file.

It is written last: a folder without one is not a complete checkpoint.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sse.checkpoint.names import MANIFEST
from megatron_sse.durable import sha256_of, write_durably

FORMAT = 1
# Files below this size are always hashed, even where only sizes are to be checked.
_SMALL = 1 << 20
_FILE_NAME = re.compile(r"\.?[\w-][\w.-]*")


class ManifestError(Exception):
    """An error for a manifest that is missing or cannot be read. One line, with the file."""


@dataclass(frozen=True)
class FileEntry:
    """A file's length in bytes and its SHA-256 as hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    step, consumed_samples: steps and samples done when it was saved. optimizer: whether it holds the optimizer's state
    besides the weights. layout: sizes of the groups that saved it (world, tensor, pipeline, virtual_pipeline, context,
    data) and distributed_optimizer. versions: of megatron_sse, torch, megatron-core.
    """

    step: int
    consumed_samples: int
    optimizer: bool
    layout: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]

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
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ManifestError(f"{path}: got format {values['format']!r}, allowed {FORMAT}")
        files = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in values["files"].items()}
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest) if f.name != "files"}, files=files)
        valid = isinstance(manifest.step, int) and isinstance(manifest.consumed_samples, int)
    except FileNotFoundError:
        raise ManifestError(f"{path}: not found") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path}: cannot be read ({' '.join(repr(error).split())})") from None
    if not valid or not all(map(_FILE_NAME.fullmatch, files)):
        raise ManifestError(f"{path}: cannot be read (wrong values)")
    return manifest


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
        size = path.stat().st_size
        if size != entry.size:
            return [f"{path}: has {size} bytes, the manifest says {entry.size}"]
        if (hashes or size < _SMALL) and sha256_of(path) != entry.sha256:
            return [f"{path}: its SHA-256 is not the manifest's"]
    except FileNotFoundError:
        return [f"{path}: not found"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return []
