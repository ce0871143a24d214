"""Which rows each segment has, and the grid of chunks laid over them.

A segment is the tokens of one (span, bank). The table of offsets has a fixed size, empty segments included, and
every shape here follows from sizes known on the host, so nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.kernels.resets import PieceResets, Resets, find_resets

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Edges:
    """Spans that continue in tokens held elsewhere, for each of F slots here.

    span_FU: int64, the spans in each slot, U of them side by side.
    continues_FU: bool, whether the span's first document began before the span.
    carries_FU: bool, whether this document fills the span, so that what enters the span also leaves it.
    exchange: given what each span does to the state that enters it, S -> transition S + state, with transition
        [F, U * H, K, 1 or K] and state [F, U * H, K, V], starts to hand states on. It returns a tensor `begun` and a
        function: finish(begun) waits and returns the states that enter the spans [F, U * H, K, V]. In backward, finish
        starts to hand on the gradients, and what made `begun` waits for them.
    """

    span_FU: Tensor
    continues_FU: Tensor
    carries_FU: Tensor
    exchange: Exchange

    def of_banks(self, num_spans: int, num_partitions: int) -> "Edges":
        """Return the edges of segments: span y's shared bank is segment y, its sparse ones start at Y + y * N."""
        # With Y = 2 and N = 3, span 0 is segment 0 and segments 2 3 4, span 1 is segment 1 and segments 5 6 7.
        sparse = num_spans + self.span_FU[..., None] * num_partitions
        sparse = sparse + torch.arange(num_partitions, device=self.span_FU.device)
        segment_FU = torch.cat((self.span_FU[..., None], sparse), dim=-1).flatten(1)
        continues, carries = (x.repeat_interleave(1 + num_partitions, 1) for x in (self.continues_FU, self.carries_FU))
        return Edges(segment_FU, continues, carries, self.exchange)


@dataclass(frozen=True)
class Segments:
    """Segments over the rows of a recurrence's inputs.

    offsets_S1: int64 [S + 1], segment s holds the sorted positions offsets[s] .. offsets[s + 1] - 1.
    row_R: int64 [R], the input row at each sorted position; None where the rows are already sorted.
    edges: segments that continue elsewhere; None where all are complete.
    resets: documents that start inside segments; None where each segment is of one document.
    """

    offsets_S1: Tensor
    row_R: Tensor | None = None
    edges: Edges | None = None
    resets: Resets | None = None

    @property
    def num_segments(self) -> int:
        return self.offsets_S1.shape[0] - 1

    def by_row(self, x_R: Tensor) -> Tensor:
        """Return values at sorted positions by row."""
        return x_R if self.row_R is None else torch.empty_like(x_R).index_copy(0, self.row_R, x_R)

    def by_position(self, x_R: Tensor) -> Tensor:
        """Return values of rows by sorted position."""
        return x_R if self.row_R is None else x_R[self.row_R]


@dataclass(frozen=True)
class Spans:
    """Runs of consecutive tokens that one state per bank goes through, from the first token to the last.

    In generation each sequence is a span, since its state is kept. In training a slot of each sequence is one, or all
    tokens are where there are no other context ranks: documents are then resets inside the spans.

    offsets_Y1: int64 [Y + 1], the spans' offsets over the tokens; no span is empty where document_T is given.
    span_T: int64, the span of each token.
    document_T: int64, the document of each token; None where each span is one document.
    edges: spans that continue elsewhere; None where all are complete.
    """

    offsets_Y1: Tensor
    span_T: Tensor
    document_T: Tensor | None = None
    edges: Edges | None = None

    @property
    def num_spans(self) -> int:
        return self.offsets_Y1.shape[0] - 1

    def segments(self) -> Segments:
        """Return the segments of one bank that all tokens meet."""
        return Segments(self.offsets_Y1, None, self.edges, self._resets(self.offsets_Y1, None, 0))

    def segments_of_banks(self, order: Tensor, offsets: Tensor, num_picks: int, num_partitions: int) -> Segments:
        """Return the segments of all banks: the spans' shared banks, then their partitions.

        Rows 0 .. T - 1 are the tokens as the shared bank sees them, row T + t * P + p is token t's pick p. order,
        offsets: of the picks, as from sort_by_segment.
        """
        # For 3 tokens of one span with one pick each, in the partitions 1 0 1: order 1 0 2 and offsets 0 1 3, so
        # row_R is 0 1 2 | 4 | 3 5 and the segments' offsets are 0 3 4 6: shared bank, partition 0, partition 1.
        num_tokens = len(self.span_T)
        token_T = torch.arange(num_tokens, device=order.device)
        row_R = torch.cat((token_T, num_tokens + order))
        offsets_S1 = torch.cat((self.offsets_Y1, num_tokens + offsets[1:]))
        token_R = torch.cat((token_T, order // num_picks))
        edges = self.edges and self.edges.of_banks(self.num_spans, num_partitions)
        return Segments(offsets_S1, row_R, edges, self._resets(offsets_S1, token_R, num_partitions))

    def _resets(self, offsets_S1: Tensor, token_R: Tensor | None, num_partitions: int) -> Resets | None:
        """Return the resets of segments whose position r holds token token_R[r]; None for the tokens in order."""
        if self.document_T is None:
            return None
        first_Y, last_Y = self.document_T[self.offsets_Y1[:-1]], self.document_T[self.offsets_Y1[1:] - 1]
        document_R, span_R = self.document_T, self.span_T
        if token_R is not None:
            document_R, span_R = document_R[token_R], span_R[token_R]
        first_S, last_S = (torch.cat((x, x.repeat_interleave(num_partitions))) for x in (first_Y, last_Y))
        return find_resets(document_R, first_Y[span_R], offsets_S1, first_S, last_S)


@dataclass(frozen=True)
class Pieces:
    """Segments cut into M pieces of at most `size` rows each; pieces of one segment follow each other.

    M = R // size + S bounds their number on the host. Those that are not used are empty, behind the last segment's end;
    there are none where M was read from the offsets.

    size: rows per piece.
    start_M, end_M: int64, sorted positions start .. end - 1; end <= start for an empty piece.
    segment_M: int64, the segment of each piece.
    step_M: int64, the number of the piece in its segment, from 0.
    first_S, last_S: int64, the first and the last piece of each segment (of an empty one: any valid index).
    empty_S: bool.
    resets: of documents that start inside the segments; None where each segment is of one document.
    """

    size: int
    start_M: Tensor
    end_M: Tensor
    segment_M: Tensor
    step_M: Tensor
    first_S: Tensor
    last_S: Tensor
    empty_S: Tensor
    resets: PieceResets | None


def cut(segments: Segments, num_rows: int, size: int, only_used: bool = False) -> Pieces:
    """Cut segments over `num_rows` rows into pieces of `size` rows, the last one of a segment shorter.

    only_used: leave out the pieces that are not used. Their number is then read from the offsets, for which a GPU would
        have to be waited for: on the CPU only.
    """
    offsets_S1 = segments.offsets_S1
    num_segments = segments.num_segments
    # Segments of 3 and 2 rows in pieces of 2 rows: pieces_S 2 1, so pieces 0 1 | 2 have segment_M 0 0 1,
    # step_M 0 1 0 and start_M 0 2 3. M is 5 // 2 + 2 = 4: piece 3 is not used, and empty at the last segment's end.
    pieces_S = (offsets_S1.diff() + size - 1) // size
    piece_offsets_S1 = torch.nn.functional.pad(pieces_S.cumsum(0), (1, 0))
    # At least one, since the indices of empty segments have to be valid.
    num_pieces = max(int(piece_offsets_S1.numpy()[-1]), 1) if only_used else num_rows // size + num_segments
    piece_M = torch.arange(num_pieces, device=offsets_S1.device)
    segment_M = torch.searchsorted(piece_offsets_S1[1:].contiguous(), piece_M, right=True).clamp(max=num_segments - 1)
    step_M = piece_M - piece_offsets_S1[segment_M]
    start_M, segment_end_M = offsets_S1[segment_M] + step_M * size, offsets_S1[segment_M + 1]
    end_M = torch.minimum(start_M + size, segment_end_M)
    resets, of_pieces = segments.resets, None
    if resets is not None:
        before_M = resets.inside(offsets_S1[segment_M], start_M)
        inside_S = resets.inside(offsets_S1[:-1], offsets_S1[1:])
        of_pieces = PieceResets(resets.inside(start_M, end_M), before_M, inside_S, resets.emptied_S, resets.spoiled_S)
    return Pieces(
        size=size,
        start_M=start_M,
        end_M=end_M,
        segment_M=segment_M,
        step_M=step_M,
        first_S=piece_offsets_S1[:-1].clamp(max=len(piece_M) - 1),
        last_S=(piece_offsets_S1[1:] - 1).clamp(min=0),
        empty_S=pieces_S == 0,
        resets=of_pieces,
    )


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of C rows, the last chunk of a segment padded, for each of H heads.

    chunks: the segments' pieces of C rows.
    row: int64 [G * H * C], the input row and head (r * H + h) of each place, R * H where the place is padding.
    place: int64 [R * H], the place ((g * H + h) * C + c) of each input row and head; G * H * C for spoiled rows, which
        have none (see Resets).
    """

    num_heads: int
    chunks: Pieces
    row: Tensor
    place: Tensor


def make_grid(segments: Segments, num_rows: int, num_heads: int, chunk_size: int) -> ChunkGrid:
    """Lay chunks of `chunk_size` rows over `num_rows` rows of `num_heads` heads."""
    # On a CPU the number of chunks in use is at hand: of many short segments, every tenth chunk or so is not used.
    chunks = cut(segments, num_rows, chunk_size, only_used=segments.offsets_S1.device.type == "cpu")
    device = segments.offsets_S1.device
    # The example of cut, with one head: positions 0 1 | 2 3 | 3 4 | 5 6, of which the chunks own 0 1 | 2 - | 3 4 | - -.
    # So row is 0 1 2 5 3 4 5 5 (5 is the zero row that _take appends), and place, its inverse, is 0 1 2 4 5.
    position_GC = chunks.start_M[:, None] + torch.arange(chunk_size, device=device)
    valid_GC = position_GC < chunks.end_M[:, None]
    # Padding must still read a valid entry of row_R; its result is replaced below.
    position_GC = position_GC.clamp(max=max(num_rows - 1, 0))
    if segments.resets is not None:
        valid_GC &= ~segments.resets.spoiled_R[position_GC]
    row_GC = position_GC if segments.row_R is None else segments.row_R[position_GC]
    # Heads are batch entries of the products: row r of head h is entry r * H + h of the flat input.
    row_GHC = row_GC[:, None] * num_heads + torch.arange(num_heads, device=device)[:, None]
    padding = num_rows * num_heads
    row = torch.where(valid_GC[:, None], row_GHC, padding).flatten()

    # All padding writes to the last entry, which is dropped: which of the writes wins does not matter.
    place = torch.full((padding + 1,), row.shape[0], dtype=torch.int64, device=device)
    place.scatter_(0, row, torch.arange(row.shape[0], device=device))
    return ChunkGrid(num_heads, chunks, row, place[:-1])


class _TakeRows(torch.autograd.Function):
    """Rows by index, `missing` where the index is out by one; each is taken at most once: backward is a take too."""

    @staticmethod
    def forward(ctx, x, index, inverse, missing):
        ctx.save_for_backward(index, inverse)
        return _take(x, index, missing)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _take(grad, inverse, 0.0), None, None, None


def _take(x: Tensor, index: Tensor, missing: float) -> Tensor:
    return torch.cat((x, x.new_full((1, *x.shape[1:]), missing))).index_select(0, index)


def to_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Return rows [R, H, c] as chunks [G * H, C, c], with zeros for padding."""
    return _TakeRows.apply(x.flatten(0, 1), grid.row, grid.place, 0.0).unflatten(0, (-1, grid.chunks.size))


def from_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """Return chunks [G * H, C, c] as rows [R, H, c], with nan for spoiled rows."""
    return _TakeRows.apply(x.flatten(0, 1), grid.place, grid.row, torch.nan).unflatten(0, (-1, grid.num_heads))
