"""The folder PREFIX.building: what a build has done so far, so that it can be resumed after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sse.data.builder.parts import Counts, part_folder
from megatron_sse.durable import write_durably
from megatron_sse.errors import UserError
from megatron_sse.reading import read_json

PLAN = "plan.json"
JOINED = "joined"
FINISHED = "finished.json"


class Workspace:
    """The folder of one build, held by one process at a time.

    plan: everything that decides what is built, by the name of the setting; a build with another plan is refused.
    """

    def __init__(self, prefix: Path, plan: dict[str, Any]):
        self.folder = prefix.with_name(prefix.name + ".building")
        self.prefix = prefix
        # In the form in which it is read back (tuples become lists), to be compared.
        self.plan = json.loads(json.dumps(plan))

    def __enter__(self) -> Workspace:
        index = Path(f"{self.prefix}.idx")
        plan = self.folder / PLAN
        if index.exists() and not plan.exists():
            raise UserError(f"--output: {index} exists already; delete it or give another prefix")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not plan.exists() or not self._continues(read_json(plan, dict[str, Any])):
                self._clear(everything=True)
                write_durably(plan, json.dumps(self.plan).encode())
        except OSError as error:
            raise UserError(f"--output: {self.prefix} cannot be written ({error.strerror}: {error.filename})") from None
        self._clear(everything=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lock.close()

    def _lock(self) -> None:
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output: another build is writing {self.prefix}; wait until it ends") from None

    def _continues(self, before: dict[str, Any]) -> bool:
        """Check whether this build continues the one in the folder. Raises UserError where the plan differs.

        One with another plan but without a finished part is abandoned.
        """
        changed = [name for name, value in self.plan.items() if before.get(name) != value]
        if not changed:
            return True
        if not any(self.folder.glob("part-*")) and self.finished() is None:
            return False
        name = changed[0]
        what = _first_file(before.get(name), self.plan[name]) if name == "inputs" else name
        raise UserError(
            f"--output: {self.folder} holds a build with other settings: {what} differs; give the same, or delete "
            f"{self.folder} to start over"
        )

    def _clear(self, everything: bool) -> None:
        """Delete partial parts of an interrupted build, or everything except the lock."""
        for path in self.folder.iterdir():
            if path.name == "lock" or not (everything or path.name.startswith("partial-")):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def is_done(self, number: int) -> bool:
        """Check whether a part is complete."""
        return part_folder(self.folder, number).is_dir()

    def finished(self) -> Counts | None:
        """Return the counts of a build whose files are all in place; None before that."""
        path = self.folder / FINISHED
        return Counts.from_json(read_json(path, dict[str, Any])) if path.is_file() else None

    def finish(self, counts: Counts) -> None:
        """Record that all files are in place, so that the parts may be deleted."""
        write_durably(self.folder / FINISHED, json.dumps(counts.to_json()).encode())

    def remove(self) -> None:
        """Delete the folder of a finished build: parts first, then the plan, then the record that it is finished."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        (self.folder / PLAN).unlink()
        shutil.rmtree(self.folder)


def _first_file(before: Any, now: list[list[Any]]) -> str:
    """Return the first file that differs from before."""
    old = {entry[0]: entry for entry in before or []}
    new = {entry[0]: entry for entry in now}
    paths = [path for path in [*new, *old] if old.get(path) != new.get(path)]
    return paths[0] if paths else "the order of the inputs"


def make_joined(folder: Path) -> Path:
    """Make an empty folder for the joined files."""
    joined = folder / JOINED
    shutil.rmtree(joined, ignore_errors=True)
    os.mkdir(joined)
    return joined
