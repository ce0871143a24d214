"""A build, in a process of its own, that kills itself and its workers at a given point:

python -m tests.data.builder.killed POINT WORKERS PREFIX INPUT
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sse.data import writer
from megatron_sse.data.builder import command, parts, workspace
from megatron_sse.data.builder.request import Request

# Points at which the build dies, and what it has done by then.
POINTS = ("third part", "sixth part", "joined", "bin named", "idx named", "half removed")
# This point is in the process that builds parts, so it needs one worker.
WITHIN = "within a part"


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def before(module: Any, name: str, is_there: Callable[..., bool]) -> None:
    """Die instead of the first call of a module's function for which `is_there` holds."""
    call = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if is_there(*arguments):
            die()
        return call(*arguments, **options)

    setattr(module, name, wrapped)


def set_point(point: str, building: Path) -> None:
    if wanted := {"third part": 3, "sixth part": 6}.get(point):
        call = command.build_parts

        def build_parts(*arguments: Any) -> Any:
            for number in call(*arguments):
                if len(list(building.glob("part-*"))) >= wanted:
                    die()
                yield number

        command.build_parts = build_parts  # type: ignore[assignment]
    elif point == WITHIN:
        before(parts, "fsync", lambda path: path.name == "lengths" and len(list(building.glob("part-*"))) >= 2)
    elif point == "joined":
        before(command, "publish", lambda *_: True)
    elif point == "bin named":
        before(writer.os, "replace", lambda source, target: str(target).endswith(".json"))
    elif point == "idx named":
        before(workspace.Workspace, "finish", lambda *_: True)
    elif point == "half removed":
        before(shutil, "rmtree", lambda path, **_: len(list(building.glob("part-*"))) == 4)


if __name__ == "__main__":
    point, workers, prefix, given = sys.argv[1:]
    set_point(point, Path(f"{prefix}.building"))
    sys.exit(command.run(Request(inputs=(given,), output=prefix, workers=int(workers), unit_bytes=2048)))
