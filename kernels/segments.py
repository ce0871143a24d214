"""Which rows each segment has, and the grid of chunks laid over them.

A segment is the tokens of one (document, bank). The table of offsets has a fixed size, empty segments included, and
every shape here follows from sizes known on the host, so nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """Segments that continue in tokens held elsewhere, for each of F spans (runs of consecutive tokens) here.

    entry_FU, exit_FU: int64, the segments that come first and last in each span, U of them side by side.
    continues_FU: bool, whether the first one began before the span.
    carries_FU: bool, whether it is also the last one, so that what enters the span also leaves it.
    exchange: given what each span does to the state that enters it, S -> transition S + state, with transition
        [F, U * H, K, 1 or K] and state [F, U * H, K, V], returns the states that enter the spans [F, U * H, K, V].
    """

    entry_FU: Tensor
    continues_FU: Tensor
    exit_FU: Tensor
    carries_FU: Tensor
    exchange: Callable[[Tensor, Tensor], Tensor]

    def of_banks(self, num_documents: int, num_partitions: int) -> "Edges":
        """Return the edges of segments: document d's shared bank is segment d, its sparse ones start at D + d * N."""

        # With D = 2 and N = 3, document 0 is segment 0 and segments 2 3 4, document 1 is segment 1 and segments 5 6 7.
        def segments(document_FU: Tensor) -> Tensor:
            sparse = num_documents + document_FU[..., None] * num_partitions
            sparse = sparse + torch.arange(num_partitions, device=document_FU.device)
            return torch.cat((document_FU[..., None], sparse), dim=-1).flatten(1)

        continues, carries = (x.repeat_interleave(1 + num_partitions, 1) for x in (self.continues_FU, self.carries_FU))
        return Edges(segments(self.entry_FU), continues, segments(self.exit_FU), carries, self.exchange)


@dataclass(frozen=True)
class Segments:
    """Segments over the rows of a recurrence's inputs.

    offsets_S1: int64 [S + 1], segment s holds the sorted positions offsets[s] .. offsets[s + 1] - 1.
    row_R: int64 [R], the input row at each sorted position; None where the rows are already sorted.
    edges: segments that continue elsewhere; None where all are complete.
    """

    offsets_S1: Tensor
    row_R: Tensor | None = None
    edges: Edges | None = None

    @property
    def num_segments(self) -> int:
        return self.offsets_S1.shape[0] - 1


@dataclass(frozen=True)
class Pieces:
    """Segments cut into M pieces of at most `size` rows each; pieces of one segment follow each other.

    M = R // size + S bounds their number on the host. Those that are not used are empty, behind the last segment's end.

    size: rows per piece.
    start_M, end_M: int64, sorted positions start .. end - 1; end <= start for an empty piece.
    segment_M: int64, the segment of each piece.
    step_M: int64, the number of the piece in its segment, from 0.
    first_S, last_S: int64, the first and the last piece of each segment (of an empty one: any valid index).
    empty_S: bool.
    """

    size: int
    start_M: Tensor
    end_M: Tensor
    segment_M: Tensor
    step_M: Tensor
    first_S: Tensor
    last_S: Tensor
    empty_S: Tensor


def cut(segments: Segments, num_rows: int, size: int) -> Pieces:
    """Cut segments over `num_rows` rows into pieces of `size` rows, the last one of a segment shorter."""
    offsets_S1 = segments.offsets_S1
    num_segments = segments.num_segments
    # Segments of 3 and 2 rows in pieces of 2 rows: pieces_S 2 1, so pieces 0 1 | 2 have segment_M 0 0 1,
    # step_M 0 1 0 and start_M 0 2 3. M is 5 // 2 + 2 = 4: piece 3 is not used, and empty at the last segment's end.
    pieces_S = (offsets_S1.diff() + size - 1) // size
    piece_offsets_S1 = torch.nn.functional.pad(pieces_S.cumsum(0), (1, 0))
    piece_M = torch.arange(num_rows // size + num_segments, device=offsets_S1.device)
    segment_M = torch.searchsorted(piece_offsets_S1[1:].contiguous(), piece_M, right=True).clamp(max=num_segments - 1)
    step_M = piece_M - piece_offsets_S1[segment_M]
    start_M, segment_end_M = offsets_S1[segment_M] + step_M * size, offsets_S1[segment_M + 1]
    return Pieces(
        size=size,
        start_M=start_M,
        end_M=torch.minimum(start_M + size, segment_end_M),
        segment_M=segment_M,
        step_M=step_M,
        first_S=piece_offsets_S1[:-1].clamp(max=len(piece_M) - 1),
        last_S=(piece_offsets_S1[1:] - 1).clamp(min=0),
        empty_S=pieces_S == 0,
    )


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of C rows, the last chunk of a segment padded, for each of H heads.

    chunks: the segments' pieces of C rows.
    row: int64 [G * H * C], the input row and head (r * H + h) of each place, R * H where the place is padding.
    place: int64 [R * H], the place ((g * H + h) * C + c) of each input row and head.
    """

    num_heads: int
    chunks: Pieces
    row: Tensor
    place: Tensor


def make_grid(segments: Segments, num_rows: int, num_heads: int, chunk_size: int) -> ChunkGrid:
    """Lay chunks of `chunk_size` rows over `num_rows` rows of `num_heads` heads."""
    chunks = cut(segments, num_rows, chunk_size)
    device = segments.offsets_S1.device
    # The example of cut, with one head: positions 0 1 | 2 3 | 3 4 | 5 6, of which the chunks own 0 1 | 2 - | 3 4 | - -.
    # So row is 0 1 2 5 3 4 5 5 (5 is the zero row that _take appends), and place, its inverse, is 0 1 2 4 5.
    position_GC = chunks.start_M[:, None] + torch.arange(chunk_size, device=device)
    valid_GC = position_GC < chunks.end_M[:, None]
    # Padding must still read a valid entry of row_R; its result is replaced below.
    position_GC = position_GC.clamp(max=max(num_rows - 1, 0))
    row_GC = position_GC if segments.row_R is None else segments.row_R[position_GC]
    # Heads are batch entries of the products: row r of head h is entry r * H + h of the flat input.
    row_GHC = row_GC[:, None] * num_heads + torch.arange(num_heads, device=device)[:, None]
    row = torch.where(valid_GC[:, None], row_GHC, num_rows * num_heads).flatten()

    # All padding writes to the last entry, which is dropped: which of the writes wins does not matter.
    place = torch.empty(num_rows * num_heads + 1, dtype=torch.int64, device=device)
    place.scatter_(0, row, torch.arange(row.shape[0], device=device))
    return ChunkGrid(num_heads, chunks, row, place[:-1])


class _TakeRows(torch.autograd.Function):
    """Rows by index, a zero row where the index is out by one; each is taken at most once: backward is a take too."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, *x.shape[1:]))).index_select(0, index)


def to_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Return rows [R, H, c] as chunks [G * H, C, c], with zeros for padding."""
    return _TakeRows.apply(x.flatten(0, 1), grid.row, grid.place).unflatten(0, (-1, grid.chunks.size))


def from_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Return chunks [G * H, C, c] as rows [R, H, c]."""
    return _TakeRows.apply(x.flatten(0, 1), grid.place, grid.row).unflatten(0, (-1, grid.num_heads))
