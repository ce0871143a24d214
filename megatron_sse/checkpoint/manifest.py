"""The manifest of a checkpoint: what it is, and size and SHA-256 of every file. A folder without is no checkpoint.

It is written last, so a folder that has one was complete when it was written.
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
# Smaller files are always hashed, also where only sizes are asked for.
_SMALL = 1 << 20
_FILE_NAME = re.compile(r"\.?[\w-][\w.-]*")


class ManifestError(Exception):
    """A folder's manifest is missing or not readable. One line, with the file."""


@dataclass(frozen=True)
class FileEntry:
    """A file's length in bytes and its SHA-256 as hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    step, consumed_samples: done when it was saved. optimizer: whether it has the optimizer's state, not weights alone.
    layout: sizes of the groups that saved it (world, tensor, pipeline, virtual_pipeline, context, data) and
    distributed_optimizer. versions: of megatron_sse, torch, megatron-core.
    """

    step: int
    consumed_samples: int
    optimizer: bool
    layout: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def write(self, folder: Path) -> None:
        """Write manifest.json; it is on the disk afterwards."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        write_durably(folder / MANIFEST, text.encode() + b"\n")

    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ManifestError where there is none that can be read."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ManifestError(f"{path}: got format {values['format']!r}, allowed {FORMAT}")
        files = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in values["files"].items()}
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest) if f.name != "files"}, files=files)
        valid = isinstance(manifest.step, int) and isinstance(manifest.consumed_samples, int)
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path}: cannot be read ({' '.join(repr(error).split())})") from None
    if not valid or not all(map(_FILE_NAME.fullmatch, files)):
        raise ManifestError(f"{path}: cannot be read (wrong values)")
    return manifest


def describe_files(folder: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Entries of all files in a folder; `known` are those that need not be read again."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = known.get(path.name) or FileEntry(path.stat().st_size, sha256_of(path))
    return entries


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str], hashes: bool) -> list[str]:
    """What is wrong with these files of a checkpoint: one line for each, with the file's path.

    hashes: of all files; else of files below 1 MiB, and of the others the size.
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
        return [f"{path}: no such file"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return []
