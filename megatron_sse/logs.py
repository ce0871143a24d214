"""Logging: lines on the console, and for each process a file with all its lines."""

import faulthandler
import logging
import os
import signal
import socket
import sys
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TextIO

from megatron_sse.config import RunConfig
from megatron_sse.errors import describe_error
from megatron_sse.run_folder import LOGS

logger = logging.getLogger("megatron_sse")

STDERR = 2
_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Log lines of this package to `stream` (stdout); of ranks above 0 only warnings."""
    console = _Console(stream or sys.stdout)
    console.setLevel(logging.WARNING if rank else logging.INFO)
    console.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logger.setLevel(logging.INFO)


def flush_console() -> None:
    """Write what is left for the standard output, or drop it where that fails (a full disk, a reader that has ended).

    Otherwise the interpreter would try again when it exits, and change the exit status.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_log(config: RunConfig, name: str) -> None:
    """Append all lines that this process logs to logs/NAME.log in the run folder.

    The call stack is written there at a crash and at signal SIGUSR1, which shows where a process hangs.
    """
    file = _File(Path(config.monitor.folder) / LOGS / f"{name}.log")
    file.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(file)
    logger.setLevel(logging.DEBUG)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = f"process {os.getpid()} on {socket.gethostname()}"
    logger.debug("%s: %s%s", name, place, f", restart {restart}" if restart != "0" else "")


class _Console(logging.StreamHandler[TextIO]):
    """The console. Lines that cannot be written stay in its buffer, and are tried again with the next line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _File(WatchedFileHandler):
    """A log file, which is made again where it or its folder was moved or deleted.

    Where it cannot be written, the first line that is lost is followed by a warning on the console.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.is_failing = False
        self._error: Exception | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self._error = None
        try:
            super().emit(record)
        except OSError as error:
            self._error = error
        was_failing, self.is_failing = self.is_failing, self._error is not None
        if self._error is not None and not was_failing:
            logger.warning("%s not written: %s", self.baseFilename, describe_error(self._error))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        assert isinstance(error, Exception)
        self._error = error

    def _open(self) -> TextIOWrapper:
        # If the file cannot be opened, call stacks go to stderr: the old descriptor may soon be another file's.
        _write_stacks(STDERR)
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        stream = super()._open()
        _write_stacks(stream)
        return stream


def _write_stacks(file: TextIO | int) -> None:
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
