"""Results as tables of text, and as JSON files in the folder that --output names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_sse.durable import output_file
from megatron_sse.errors import UserError
from megatron_sse.installed import versions
from megatron_sse.lease import hold

# The lease on a folder of results.
_LEASE = "results"


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return a title and right-aligned columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines = ["  ".join(row).rstrip() for row in cells]
    return "\n".join([title, *lines, ""])


def make_folder(path: str) -> None:
    """Make the folder for results. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be created ({error.strerror})") from None


@contextmanager
def result_folder(path: str, is_writer: bool = True) -> Iterator[Path]:
    """Hold a folder for results, which is made where it is missing, so that only this command writes to it.

    is_writer: of the processes of one command, only one holds the folder. Raises UserError.
    """
    with hold(Path(path), "--output", _LEASE) if is_writer else nullcontext():
        yield Path(path)


def write_json(path: Path, about: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write a file with the versions, which appears complete or not at all. Raises UserError."""
    text = json.dumps(about | {"versions": versions()} | results, indent=2) + "\n"
    try:
        with output_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror})") from None
    return path
