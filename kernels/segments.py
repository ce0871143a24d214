"""Where each segment's rows stand, and the grid of chunks laid over them.

A segment is the tokens of one (document, bank). The table of offsets has a fixed size, empty segments included, and
every shape here follows from sizes known on the host, so nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Segments over the rows of a recurrence's inputs.

    offsets_S1: int64 [S + 1], segment s holds the sorted positions offsets[s] .. offsets[s + 1] - 1.
    row_T: int64 [T], the input row that stands at each sorted position; None where the rows are already sorted.
    """

    offsets_S1: Tensor
    row_T: Tensor | None = None

    @property
    def num_segments(self) -> int:
        return self.offsets_S1.shape[0] - 1


@dataclass(frozen=True)
class ChunkGrid:
    """Segments cut into chunks of C rows; the last chunk of a segment is padded.

    row_GC: int64 [G, C], the input row of each place, T where the place is padding.
    place_T: int64 [T], the place (g * C + c) of each input row.
    segment_G: int64 [G], the segment of each chunk.
    first_G: bool [G], whether the chunk opens its segment.
    last_S: int64 [S], the last chunk of each segment (of an empty one: any valid index).
    empty_S: bool [S].
    """

    row_GC: Tensor
    place_T: Tensor
    segment_G: Tensor
    first_G: Tensor
    last_S: Tensor
    empty_S: Tensor


def make_grid(segments: Segments, num_rows: int, chunk_size: int) -> ChunkGrid:
    """Lay chunks of `chunk_size` over `num_rows` rows; G = T // C + S bounds their number on the host."""
    offsets_S1 = segments.offsets_S1
    device = offsets_S1.device
    num_segments = segments.num_segments
    num_chunks = num_rows // chunk_size + num_segments

    chunks_S = (offsets_S1.diff() + chunk_size - 1) // chunk_size
    chunk_offsets_S1 = torch.nn.functional.pad(chunks_S.cumsum(0), (1, 0))
    chunk_G = torch.arange(num_chunks, device=device)
    # Chunks past the last used one fall to the last segment, where they lie behind its end: all padding.
    segment_G = torch.searchsorted(chunk_offsets_S1[1:].contiguous(), chunk_G, right=True).clamp(max=num_segments - 1)
    step_G = chunk_G - chunk_offsets_S1[segment_G]

    position_GC = (offsets_S1[segment_G] + step_G * chunk_size)[:, None] + torch.arange(chunk_size, device=device)
    valid_GC = position_GC < offsets_S1[segment_G + 1][:, None]
    position_GC = position_GC.clamp(max=max(num_rows - 1, 0))
    row_GC = position_GC if segments.row_T is None else segments.row_T[position_GC]
    row_GC = torch.where(valid_GC, row_GC, num_rows)

    place_T = torch.empty(num_rows + 1, dtype=torch.int64, device=device)
    place_T.scatter_(0, row_GC.flatten(), torch.arange(num_chunks * chunk_size, device=device))
    return ChunkGrid(
        row_GC=row_GC,
        place_T=place_T[:num_rows],
        segment_G=segment_G,
        first_G=step_G == 0,
        last_S=(chunk_offsets_S1[1:] - 1).clamp(min=0),
        empty_S=chunks_S == 0,
    )


class _TakeRows(torch.autograd.Function):
    """Rows by index, a zero row where the index is T; each row is taken at most once, so backward is a gather too."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        ctx.num_rows = x.shape[0]
        return _take(x, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    num_rows = x.shape[0]
    taken = x.index_select(0, index.clamp(max=num_rows - 1))
    padding = (index >= num_rows).reshape(-1, *[1] * (x.dim() - 1))
    return taken.masked_fill_(padding, 0)


def to_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Rows [T, H, ...] into chunks [G, H, C, ...], padding zero."""
    num_chunks, chunk_size = grid.row_GC.shape
    taken = _TakeRows.apply(x, grid.row_GC.flatten(), grid.place_T)
    return taken.view(num_chunks, chunk_size, *x.shape[1:]).transpose(1, 2)


def from_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Chunks [G, H, C, ...] back into rows [T, H, ...]."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
    return _TakeRows.apply(rows, grid.place_T, grid.row_GC.flatten())
