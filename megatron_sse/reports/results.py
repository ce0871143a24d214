"""Results as tables of text, and as JSON files in the folder that --output names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_sse.errors import UserError
from megatron_sse.installed import versions


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


def write_json(path: Path, about: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write a file with the versions, which appears complete or not at all. Raises UserError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(about | {"versions": versions()} | results, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror})") from None
    return path
