"""Results as tables of text."""

from __future__ import annotations


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return a title and right-aligned columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines = ["  ".join(row).rstrip() for row in cells]
    return "\n".join([title, *lines, ""])
