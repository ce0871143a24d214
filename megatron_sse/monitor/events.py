"""TensorBoard event files, written at once.

torch's SummaryWriter leaves the writing to a thread, which prints a traceback and ends at the first full disk.
"""

from __future__ import annotations

import os
import socket
import time
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_sse.run_folder import EVENTS


class Events:
    """The scalars of a run that starts at step `first_step`, in a file in `folder` that is made when it is needed."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.next_step = folder, first_step
        self.path: Path | None = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append scalars by tag to the file, all or none of them. Raises OSError."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.next_step = step

    def _append(self, event: Event) -> None:
        """Append an event, and before it what begins a file where the file is new or was moved or deleted."""
        if self.path is None or not self.path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path = self.folder / self._new_name()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            records = BytesIO()
            for each in [event] if size else [*self._first_events(), event]:
                RecordWriter(records).write(each.SerializeToString())
            rest = records.getbuffer()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                # Nothing behind a record of which only a part was written could be read.
                file.truncate(size)
                raise

    def _first_events(self) -> list[Event]:
        """Return the file's version, and the step from which on earlier files are out of date."""
        now = time.time()
        restart = SessionLog(status=SessionLog.START)
        return [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=self.next_step, session_log=restart),
        ]

    def _new_name(self) -> str:
        # TensorBoard reads files in the order of their names. The clock may have been set back since the last one.
        stamps = [path.name.removeprefix(f"{EVENTS}.").split(".")[0] for path in self.folder.glob(f"{EVENTS}.*")]
        newest = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
        return f"{EVENTS}.{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}.0"
