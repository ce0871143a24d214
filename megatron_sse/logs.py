"""Logging: lines on the console, and for each process a file with all its lines."""

import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

from megatron_sse.config import RunConfig
from megatron_sse.errors import UserError
from megatron_sse.run_folder import LOGS

logger = logging.getLogger("megatron_sse")

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Log lines of this package to `stream` (stdout); of ranks above 0 only warnings."""
    console = logging.StreamHandler(stream or sys.stdout)
    console.setLevel(logging.WARNING if rank else logging.INFO)
    console.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logger.setLevel(logging.INFO)


def open_log(config: RunConfig, name: str) -> None:
    """Append all lines that this process logs to logs/NAME.log in the run folder.

    The call stack is written there at a crash and at signal SIGUSR1, which shows where a process hangs.
    Raises UserError where nothing can be written.
    """
    folder = Path(config.monitor.folder)
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        file = _File(folder / LOGS / f"{name}.log", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"monitor.folder: got {folder}, allowed a folder that can be written to ({error.strerror})"
        ) from None
    file.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(file)
    logger.setLevel(logging.DEBUG)
    assert file.stream is not None
    faulthandler.enable(file.stream)
    faulthandler.register(signal.SIGUSR1, file.stream)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = f"process {os.getpid()} on {socket.gethostname()}"
    logger.debug("%s: %s%s", name, place, f", restart {restart}" if restart != "0" else "")


class _File(logging.FileHandler):
    """A log file whose lines are lost on a full disk, while the run continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
