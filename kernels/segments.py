"""Where each segment's rows stand, and the grid of chunks laid over them.

A segment is the tokens of one (document, bank). The table of offsets has a fixed size, empty segments included, and
every shape here follows from sizes known on the host, so nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """Segments that go on in tokens which are not at hand, for each of F spans (runs of consecutive tokens) here.

    entry_FX, exit_FX: int64, the segments that come first and last in each span, X of them side by side.
    continues_FX: bool, the first one began before the span.
    carries_FX: bool, it is also the last one: what enters the span leaves it.
    exchange: given what each span does to the state that enters it, S -> transition S + state, with transition
        [F, X * H, K, 1 or K] and state [F, X * H, K, V], returns the states that enter the spans [F, X * H, K, V].
    """

    entry_FX: Tensor
    continues_FX: Tensor
    exit_FX: Tensor
    carries_FX: Tensor
    exchange: Callable[[Tensor, Tensor], Tensor]

    def of_banks(self, num_documents: int, num_partitions: int) -> "Edges":
        """From documents to segments: document d's shared bank is segment d, the sparse ones start at D + d * N."""

        def segments(document_FX: Tensor) -> Tensor:
            sparse = num_documents + document_FX[..., None] * num_partitions
            sparse = sparse + torch.arange(num_partitions, device=document_FX.device)
            return torch.cat((document_FX[..., None], sparse), dim=-1).flatten(1)

        continues, carries = (x.repeat_interleave(1 + num_partitions, 1) for x in (self.continues_FX, self.carries_FX))
        return Edges(segments(self.entry_FX), continues, segments(self.exit_FX), carries, self.exchange)


@dataclass(frozen=True)
class Segments:
    """Segments over the rows of a recurrence's inputs.

    offsets_S1: int64 [S + 1], segment s holds the sorted positions offsets[s] .. offsets[s + 1] - 1.
    row_T: int64 [T], the input row that stands at each sorted position; None where the rows are already sorted.
    edges: segments that go on elsewhere; None where all are whole.
    """

    offsets_S1: Tensor
    row_T: Tensor | None = None
    edges: Edges | None = None

    @property
    def num_segments(self) -> int:
        return self.offsets_S1.shape[0] - 1


@dataclass(frozen=True)
class Pieces:
    """Segments cut into G pieces of at most `size` rows each; pieces of one segment follow each other.

    G = T // size + S bounds their number on the host. What is not used lies behind the last segment's end: empty.

    size: rows per piece.
    start_G, end_G: int64, sorted positions start .. end - 1; end <= start for an empty piece.
    segment_G: int64, the segment of each piece.
    step_G: int64, the number of the piece in its segment, from 0.
    first_S, last_S: int64, the first and the last piece of each segment (of an empty one: any valid index).
    empty_S: bool.
    """

    size: int
    start_G: Tensor
    end_G: Tensor
    segment_G: Tensor
    step_G: Tensor
    first_S: Tensor
    last_S: Tensor
    empty_S: Tensor


def cut(segments: Segments, num_rows: int, size: int) -> Pieces:
    """Cut segments over `num_rows` rows into pieces of `size` rows, the last one of a segment shorter."""
    offsets_S1 = segments.offsets_S1
    num_segments = segments.num_segments
    pieces_S = (offsets_S1.diff() + size - 1) // size
    piece_offsets_S1 = torch.nn.functional.pad(pieces_S.cumsum(0), (1, 0))
    piece_G = torch.arange(num_rows // size + num_segments, device=offsets_S1.device)
    segment_G = torch.searchsorted(piece_offsets_S1[1:].contiguous(), piece_G, right=True).clamp(max=num_segments - 1)
    step_G = piece_G - piece_offsets_S1[segment_G]
    start_G, segment_end_G = offsets_S1[segment_G] + step_G * size, offsets_S1[segment_G + 1]
    return Pieces(
        size=size,
        start_G=start_G,
        end_G=torch.minimum(start_G + size, segment_end_G),
        segment_G=segment_G,
        step_G=step_G,
        first_S=piece_offsets_S1[:-1].clamp(max=len(piece_G) - 1),
        last_S=(piece_offsets_S1[1:] - 1).clamp(min=0),
        empty_S=pieces_S == 0,
    )


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of C rows, the last chunk of a segment padded, for each of H heads.

    chunks: the segments' pieces of C rows.
    row: int64 [G * H * C], the input row and head (t * H + h) of each place, T * H where the place is padding.
    place: int64 [T * H], the place ((g * H + h) * C + c) of each input row and head.
    """

    num_heads: int
    chunks: Pieces
    row: Tensor
    place: Tensor


def make_grid(segments: Segments, num_rows: int, num_heads: int, chunk_size: int) -> ChunkGrid:
    """Lay chunks of `chunk_size` rows over `num_rows` rows of `num_heads` heads."""
    chunks = cut(segments, num_rows, chunk_size)
    device = segments.offsets_S1.device
    position_GC = chunks.start_G[:, None] + torch.arange(chunk_size, device=device)
    valid_GC = position_GC < chunks.end_G[:, None]
    position_GC = position_GC.clamp(max=max(num_rows - 1, 0))
    row_GC = position_GC if segments.row_T is None else segments.row_T[position_GC]
    row_GHC = row_GC[:, None] * num_heads + torch.arange(num_heads, device=device)[:, None]
    row = torch.where(valid_GC[:, None], row_GHC, num_rows * num_heads).flatten()

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
    """Rows [T, H, D] into chunks [G * H, C, D], padding zero."""
    return _TakeRows.apply(x.flatten(0, 1), grid.row, grid.place).unflatten(0, (-1, grid.chunks.size))


def from_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Chunks [G * H, C, D] back into rows [T, H, D]."""
    return _TakeRows.apply(x.flatten(0, 1), grid.place, grid.row).unflatten(0, (-1, grid.num_heads))
