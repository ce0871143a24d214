"""Tables derived from a large token file: made once per machine, kept beside it, memory-mapped by all processes.

It lies in <prefix>.made/<fingerprint>/<name>/: arrays (.npy) and facts.json. A folder appears complete or not at all,
and never changes; a token file with other content has another fingerprint. All of it can be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from megatron_sse.durable import fsync, unique
from megatron_sse.errors import UserError
from megatron_sse.reading import read_json

logger = logging.getLogger(__name__)

# Smaller files are worked out as fast as they are found, so that nothing is kept of them.
LARGE_INDEX, LARGE_TOKENS = 1 << 22, 1 << 28
FACTS = "facts.json"
# Goes into the fingerprint: another number where what is kept means something else.
_VERSION = 1
_EDGE = 1 << 16
_FINGERPRINT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Made:
    """Arrays by name, and facts that JSON can hold."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)


class _Content(BaseModel):
    """The content of facts.json."""

    arrays: list[str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class MadeFolder:
    """The tables kept for a token file with one content. path: None where none are kept."""

    path: Path | None = None

    def get(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what was kept under `name`, memory-mapped; else make it, and keep it if the folder can be written."""
        if self.path is None:
            return make()
        found = _read(self.path / name)
        if found is not None:
            return found
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with _alone(self.path / "lock"):
                # Another process may have made it while this one waited.
                found = _read(self.path / name)
                if found is not None:
                    return found
                made = make()
                _write(self.path / name, made)
        except OSError as error:
            logger.info("%s: nothing is kept there (%s)", self.path, error.strerror)
            return make()
        _remove_others(self.path)
        return _read(self.path / name) or made


def made_folder(prefix: str) -> MadeFolder:
    """Return the folder for what is made of the token file at a prefix, as the file is now."""
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    if index.stat().st_size < LARGE_INDEX and tokens.stat().st_size < LARGE_TOKENS:
        return MadeFolder()
    return MadeFolder(Path(prefix + ".made") / _fingerprint(prefix))


def _fingerprint(prefix: str) -> str:
    """Return a hash of sizes, times of change, and of each file's first and last 64 KiB; reading all takes seconds."""
    digest = hashlib.sha256(f"version {_VERSION}".encode())
    for suffix in (".idx", ".bin", ".mask"):
        path = Path(prefix + suffix)
        if not path.exists():
            continue
        status = path.stat()
        digest.update(f" {suffix} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, status.st_size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()[:32]


def _read(path: Path) -> Made | None:
    """Return what is there, or None: also where it is damaged, so that it is made again."""
    try:
        content = read_json(path / FACTS, _Content)
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in content.arrays}
        return Made(arrays, content.facts)
    except (UserError, OSError, ValueError):
        return None


def _write(path: Path, made: Made) -> None:
    building = path.with_name(f"{path.name}.{unique()}.tmp")
    building.mkdir()
    try:
        for name, array in made.arrays.items():
            np.save(building / f"{name}.npy", array)
            fsync(building / f"{name}.npy")
        (building / FACTS).write_text(_Content(arrays=list(made.arrays), facts=made.facts).model_dump_json())
        fsync(building / FACTS)
        # What is there was not readable, or another machine was faster on a file system without locks.
        if path.exists() and _read(path) is None:
            shutil.rmtree(path)
        with suppress(FileExistsError):
            building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process of the machine at a time into the block."""
    # Not "w", which would empty whatever the name leads to.
    with lock.open("a") as file:
        # Some network file systems have no locks. Then several processes make it, and the first to finish is kept.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_others(path: Path) -> None:
    """Remove what was made of earlier contents of the file; processes that have it open keep it.

    Whatever does not have the name of a fingerprint is another's, and stays.
    """
    for other in path.parent.iterdir():
        if other != path and _FINGERPRINT.fullmatch(other.name):
            shutil.rmtree(other, ignore_errors=True)
