"""Writing files that appear complete or not at all, or are on the disk when the call returns; and their SHA-256."""

import hashlib
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sse.errors import UserError

_BLOCK = 1 << 22
# Of the names that a process gives to files and folders that are not complete.
UNIQUE = r"[0-9a-f]{16}"


def unique() -> str:
    """Return a part of a name that no other process uses; it matches UNIQUE."""
    return secrets.token_hex(8)


def create_file(path: Path) -> BinaryIO:
    """Open a new file for writing; its mode is what the umask leaves.

    Raises FileExistsError where there is anything of this name, also a link, which is not followed.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def write_durably(path: Path, content: bytes) -> None:
    """Write a complete file; its name always has either the old content or the new one, never a part."""
    with _replacing(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)


def check_output(key: str, path: str) -> None:
    """Raise UserError where the folder of a file to be written is not there, before what goes into it is computed."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{key}: the folder {folder} was not found; make it, or name a file elsewhere")


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that a user named, for writing; it gets its content at the end of the block, or not at all.

    A link stays one: the file that it leads to is replaced. What is there but not a regular file, such as /dev/null or
    a named pipe, is written into. Raises OSError.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    # The shell has opened what these stand for, so that it must stay the same file.
    if not stat.S_ISREG(mode) or str(path).startswith(("/dev/", "/proc/")):
        with path.open("wb") as file:
            yield file
        return
    with _replacing(Path(os.path.realpath(path))) as file:
        yield file


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which replaces `path` at the end of the block; a file that is replaced hands on its mode."""
    temporary = path.with_name(f"{path.name[:60]}.{unique()}.tmp")
    try:
        with create_file(temporary) as file:
            yield file
            if path.is_file() and not path.is_symlink():
                mode = stat.S_IMODE(path.stat().st_mode)
                if mode != stat.S_IMODE(os.fstat(file.fileno()).st_mode):
                    os.fchmod(file.fileno(), mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
