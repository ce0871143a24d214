"""Splitting a range of a flattened tensor into boxes, the only shapes that distributed checkpoints can hold."""

import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]


def split_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield offset and shape of the boxes that together are elements start to stop - 1 of a row-major tensor, in order.

    Elements 3 to 13 of a [4, 4] tensor: the last of row 0, rows 1 and 2, and the first two of row 3, so
    ((0, 3), (1, 1)), ((1, 0), (2, 4)) and ((3, 0), (1, 2)).
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    # Rows first to last - 1 are complete; first > last where the range lies inside one row.
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
