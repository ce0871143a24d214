"""Ranges of a flattened tensor as boxes, the only shapes that distributed checkpoints know."""

import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]


def split_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Offset and shape of the boxes that elements start..stop of a row-major tensor make up, in that order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    # Rows first..last are whole.
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if stop % row:
        yield from _in_row(shape, last, 0, stop % row)


def _in_row(shape: tuple[int, ...], number: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in split_into_boxes(shape[1:], start, stop):
        yield (number, *offset), (1, *size)
