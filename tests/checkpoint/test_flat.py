"""Ranges of flattened tensors as boxes."""

import itertools
import math

import pytest
import torch

from megatron_sse.checkpoint.flat import split_into_boxes

SHAPES: list[tuple[int, ...]] = [(), (7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        boxes = list(split_into_boxes(shape, start, stop))
        parts = [whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] for box in boxes]
        assert [tuple(part.shape) for part in parts] == [size for _, size in boxes]
        assert [int(x) for part in parts for x in part.flatten()] == list(range(start, stop))
        # Partial rows at both ends of each dim, and complete rows between them.
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
