"""Leases: the right to write a run or a result, which one process at a time has, on any machine that sees the folder.

The lease on NAME is a file NAME.lease_1 that names its holder, who touches it every 10 seconds. Whoever wants the lease
next waits for nothing where the holder is known to have ended (a process of the same machine), and otherwise watches
the file: a holder that touches it is alive, one that does not for a minute is taken to be dead. No clocks are compared.
To take over NAME.lease_1 is to create NAME.lease_2, which only one process can: file systems that machines share
create a file for one of them only. The new holder then deletes the old file, and its own at the end.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sse.durable import create_file
from megatron_sse.errors import UserError, not_writable
from megatron_sse.reading import read_json

logger = logging.getLogger(__name__)

RENEWED_EVERY, STALE_AFTER = 10.0, 60.0
# A lease that the file system calls this old is not watched.
_LONG_AGO = 10 * STALE_AFTER
_MAX_BYTES = 1 << 12


class LeaseLostError(OSError):
    """An error for a lease that another process has taken over, as its holder did not renew it."""


@dataclass(frozen=True)
class Holder:
    """A process, told apart from others with its number: by its machine's boot, its container and when it started."""

    host: str
    pid: int
    since: str
    ticks: int
    boot: str
    namespace: str

    @classmethod
    def of_this_process(cls) -> Holder:
        """Describe this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        since, pid = time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid()
        return cls(socket.gethostname(), pid, since, _start_of(pid) or 0, boot, os.readlink("/proc/self/ns/pid"))

    def is_alive(self) -> bool | None:
        """Check whether the process has not ended; None where this cannot be seen from here."""
        here = Holder.of_this_process()
        if (self.boot, self.namespace) != (here.boot, here.namespace):
            return None
        return _start_of(self.pid) == self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def _start_of(pid: int) -> int | None:
    """Return when a process of this machine started, in ticks of its clock; None where it has ended."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended, and waits only for its parent to notice.
    return None if fields[0] in "ZX" else int(fields[19])


class Lease:
    """A lease that this process holds and renews in a thread.

    place: the file or folder that it is for. lost: called by the thread, at most once, where it was taken over.
    """

    def __init__(self, place: Path, name: Path, file: Path, holder: Holder, lost: Callable[[LeaseLostError], None]):
        self.place, self.name, self.file, self.holder, self.lost = place, name, file, holder, lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError where another process has taken the lease over."""
        number = _number(self.file)
        files = [path for path in _files(self.name) if _number(path) >= number]
        taken = [path for path in files if path != self.file or not self._is_own()]
        if taken:
            holder = _holder_of(taken[-1])
            raise LeaseLostError(
                f"{self.place} was taken over by {holder}, as this process stood still or the folder was moved"
            )

    def _is_own(self) -> bool:
        """Check that the file is not another process's, which made it after ours had been moved or deleted."""
        holder = _holder_of(self.file)
        return holder == self.holder or not isinstance(holder, Holder)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            try:
                self.check()
                self._touch()
            except LeaseLostError as error:
                return self.lost(error)
            # A file system that fails now may work again later.
            except OSError:
                pass

    def _touch(self) -> None:
        try:
            os.utime(self.file)
        except FileNotFoundError:
            _write(self.file, self.holder)

    def release(self) -> None:
        """Give the lease back."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_own():
                self.file.unlink()


@contextmanager
def hold(
    place: Path, key: str, inside: str = "", lost: Callable[[LeaseLostError], None] = logger.error
) -> Iterator[Lease]:
    """Hold the lease on a file or folder, which need not exist, during a block.

    key: the setting or argument that named it. inside: name of the lease in a folder; without it the lease's file is
    beside `place`. lost: called in a thread where another process took the lease over.
    Raises UserError, which names the holder, where another process has it, and where its file cannot be written.
    """
    name = place / inside
    try:
        _make(name.parent)
        lease = Lease(place, name, *_take(place, name, key), lost)
    except OSError as error:
        if not inside:
            raise UserError(f"{key}: {place} cannot be written: {error.strerror}") from None
        raise not_writable(key, place, error) from None
    try:
        yield lease
    finally:
        lease.release()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def refuse_if_held_here(place: Path, key: str, inside: str = "") -> None:
    """Raise UserError where a process of this machine holds the lease, without writing anything."""
    for file in _files(place / inside):
        holder = _holder_of(file)
        if isinstance(holder, Holder) and holder.is_alive():
            raise _in_use(place, key, file)


def _take(place: Path, name: Path, key: str) -> tuple[Path, Holder]:
    dead = _files(name)
    for file in dead:
        if _is_held(file):
            raise _in_use(place, key, file)
    holder = Holder.of_this_process()
    own = name.with_name(f"{name.name}.lease_{1 + max(map(_number, dead), default=0)}")
    try:
        _write(own, holder)
    except FileExistsError:
        raise _in_use(place, key, own) from None
    # Each of two processes that found different files creates its own before it looks for others: one sees the other's.
    others = set(_files(name)) - {*dead, own}
    if others:
        own.unlink()
        raise _in_use(place, key, others.pop())
    for file in dead:
        logger.warning("%s: %s ended without giving it back", file, _holder_of(file))
        file.unlink(missing_ok=True)
    return own, holder


def _is_held(file: Path) -> bool:
    """Check whether the holder of a lease is alive; this may take a minute. Raises OSError."""
    holder = _holder_of(file)
    alive = holder.is_alive() if isinstance(holder, Holder) else None
    if alive is not None:
        return alive
    try:
        renewed = _renewal_of(file)
        with tempfile.TemporaryFile(dir=file.parent) as now:
            if os.fstat(now.fileno()).st_mtime - renewed / 1e9 > _LONG_AGO:
                return False
        logger.info("%s is held by %s: waiting for a sign of life, for %g s at most", file, holder, STALE_AFTER)
        end = time.monotonic() + STALE_AFTER
        while time.monotonic() < end:
            time.sleep(STALE_AFTER / 60)
            if _renewal_of(file) != renewed:
                return True
    except FileNotFoundError:
        pass
    return False


def _renewal_of(file: Path) -> int:
    """Return when a lease was renewed, in nanoseconds by the file system's clock."""
    # Network file systems ask their server for the time when a file is opened.
    with file.open("rb") as opened:
        return os.fstat(opened.fileno()).st_mtime_ns


def _write(file: Path, holder: Holder) -> None:
    with create_file(file) as opened:
        try:
            os.write(opened.fileno(), json.dumps(asdict(holder)).encode())
        except OSError as error:
            # On a full disk a file without a name is a lease, too; the run may make room.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


def _holder_of(file: Path) -> Holder | str:
    try:
        return read_json(file, Holder, _MAX_BYTES)
    # Not written to the end yet, or by hand.
    except UserError:
        return "another process"


def _files(name: Path) -> list[Path]:
    """Return the files of a lease, the oldest first; more than one only while it is taken over."""
    pattern = re.compile(re.escape(name.name) + r"\.lease_[1-9]\d{0,8}")
    try:
        found = [name.with_name(entry) for entry in os.listdir(name.parent) if pattern.fullmatch(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=_number)


def _number(file: Path) -> int:
    return int(file.name.rpartition("_")[2])


def _in_use(place: Path, key: str, file: Path) -> UserError:
    return UserError(f"{key}: got {place}, which {_holder_of(file)} is writing to; wait, end it, or give another place")
