"""Writing files that are on the disk when the call returns, and their SHA-256."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22


def write_durably(path: Path, content: bytes) -> None:
    """Write a complete file; its name always has either the old content or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(error: Exception) -> str:
    """Return a message of one line, with the file, for an error of the file system."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class HashedFile(io.RawIOBase):
    """A file that is written from start to end and hashed on the way.

    After an OSError, which is kept in `error`, later writes are discarded: raised in the middle of torch's writer, the
    error would be lost. is_stopped: called before each write; once it returns true, writes are discarded.
    """

    def __init__(self, path: Path, is_stopped: Callable[[], bool]):
        self.file = path.open("wb")
        self.is_stopped = is_stopped
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self.error is None and self.is_stopped():
            self.error = InterruptedError("stopped")
        if self.error is None:
            try:
                self.file.write(view)
                self.digest.update(view)
            except OSError as error:
                self.error = error
        return len(view)

    def tell(self) -> int:
        return self.size


@contextmanager
def hashed_file(path: Path, is_stopped: Callable[[], bool]) -> Iterator[HashedFile]:
    """Open a HashedFile, which is on the disk at the end of the block. Raises OSError if something was not written."""
    stream = HashedFile(path, is_stopped)
    try:
        with stream.file:
            yield stream
            if stream.error is not None:
                raise stream.error
            stream.file.flush()
            os.fsync(stream.file.fileno())
    except OSError as error:
        # Not every OSError holds the file's name.
        raise OSError(error.errno, error.strerror, str(path)) from None
