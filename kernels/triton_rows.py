"""Which rows the kernels read, in which order, and how the work on them is cut.

Row t < T is token t as the shared bank sees it, row T + t * P + p is token t's pick p. Kernels walk the rows sorted by
segment and read tokens through `token_R`, so that gathered rows are never written to memory. A row's results (outputs,
gradients) go to its own place [T (1 + P), ...]; picks are summed afterwards, so nothing is added atomically.

For example, 3 tokens with one pick each, in the banks 1, 0, 1: rows 0 1 2 are the shared bank's, rows 3 4 5 the picks.
Sorted: row_R 0 1 2 | 4 | 3 5 (shared bank, bank 0, bank 1) and token_R 0 1 2 | 1 | 0 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.banks import Picks
from megatron_sse.kernels.segments import Pieces, Segments, Spans, cut
from megatron_sse.kernels.triton.finite import bad_tokens
from megatron_sse.kernels.triton.routing import sort_picks
from megatron_sse.kernels.triton.row_tables import row_tables
from megatron_sse.kernels.triton.segment_tables import segment_tables


@dataclass(frozen=True)
class Rows:
    """R = T (1 + P) rows sorted by segment; the shared bank's segments come first, at the positions 0 .. T - 1.

    num_tokens: T.
    row_R, token_R: int32, the row and the token at each sorted position; the token is -1 for spoiled rows (see
        kernels.resets), which kernels read as zeros.
    run_R: int32, how many documents have started inside segments up to this position. Rows of one chunk with the same
        number are of the same document.
    chunk_start_G, chunk_end_G: int64, the segments in chunks of CHUNK_SIZE rows, as sorted positions.
    pieces: the segments in pieces of several chunks, M of them, the unit of the scan between them.
    chunk_M: int64, the first chunk of each piece.
    """

    num_tokens: int
    row_R: Tensor
    token_R: Tensor
    run_R: Tensor
    chunk_start_G: Tensor
    chunk_end_G: Tensor
    pieces: Pieces
    chunk_M: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tables that the operators take after their other inputs."""
        spans = (self.chunk_start_G, self.chunk_end_G, self.pieces.start_M, self.pieces.end_M)
        return self.row_R, self.token_R, self.run_R, *spans, self.chunk_M


def make_rows(segments: Segments, num_tokens: int, num_picks: int, chunks_per_piece: int) -> Rows:
    """Make the rows of `segments` in torch (where its row_R is None: the shared bank alone, in order).

    This is the plain form of lay_out, which tests compare with it.
    """
    num_rows = num_tokens * (1 + num_picks)
    device = segments.offsets_S1.device
    row_R = segments.row_R
    if row_R is None:
        row_R = torch.arange(num_rows, device=device)
    token_R = row_R
    if num_picks:
        token_R = torch.where(row_R < num_tokens, row_R, (row_R - num_tokens) // num_picks)
    run_R, resets = torch.zeros_like(token_R), segments.resets
    if resets is not None:
        run_R, token_R = resets.count_R1[1:], token_R.masked_fill(resets.spoiled_R, -1)
    chunks = cut(segments, num_rows, CHUNK_SIZE)
    pieces = cut(segments, num_rows, CHUNK_SIZE * chunks_per_piece)
    # A piece is a whole number of chunks, so its first chunk is its segment's first plus the chunks before it there.
    step_M = (pieces.start_M - segments.offsets_S1[pieces.segment_M]) // CHUNK_SIZE
    chunk_M = chunks.first_S[pieces.segment_M] + step_M
    return Rows(num_tokens, row_R.int(), token_R.int(), run_R.int(), chunks.start_M, chunks.end_M, pieces, chunk_M)


class Scales(NamedTuple):
    """Factors of log decays and write strengths, of values, and of outputs, fp32 by row; zeros for spoiled rows."""

    writes_R: Tensor
    write_R: Tensor
    read_R: Tensor


def lay_out(
    banks: Sequence[Tensor], v_THV: Tensor, picks: Picks | None, spans: Spans, chunks_per_piece: int, delta_rule: bool
) -> tuple[Rows, Scales, Tensor]:
    """Return the rows of all banks, their scales, and which sorted positions are spoiled.

    Args:
        banks: q, k, g (and beta) of the shared bank and of the partitions, in the dtype in which kernels read them.
        picks: None where there are no partitions.
    """
    num_tokens, offsets_S1, num_partitions = len(v_THV), spans.offsets_Y1, 0
    order = bank_TP = bad_ZT = None
    scales_TP: tuple[Tensor | None, ...] = (None, None, None)
    if picks is not None:
        bank_TP, num_partitions = picks.bank_TP, picks.num_partitions
        scales_TP = picks.writes, picks.write_scale, picks.read_scale
        order, offsets_S1 = sort_picks(bank_TP, spans.span_T, spans.offsets_Y1, num_partitions)
    document_T = spans.document_T
    if document_T is not None:
        bad_ZT = bad_tokens([x.detach() for x in banks], v_THV.detach(), 1 if picks is None else 2)
    of_rows = row_tables(
        *(order, bank_TP, spans.span_T, document_T, spans.offsets_Y1, offsets_S1, bad_ZT),
        *(None if x is None else x.detach() for x in scales_TP),
        *(num_partitions, delta_rule),
    )
    size = CHUNK_SIZE * chunks_per_piece
    of_segments = segment_tables(
        *(offsets_S1, spans.offsets_Y1, document_T, order, of_rows.run_R, of_rows.spoiled_R),
        *(num_tokens, num_partitions, size),
    )
    rows = Rows(
        *(num_tokens, of_rows.row_R, of_rows.token_R, of_rows.run_R),
        *(of_segments.chunk_start_G, of_segments.chunk_end_G),
        of_segments.pieces(size, document_T is not None),
        of_segments.chunk_M,
    )
    write_R, read_R = of_rows.write_R, of_rows.read_R
    if picks is not None:
        write_R, read_R = _OfPicks.apply(picks.write_scale, picks.read_scale, of_rows, document_T is not None)
    return rows, Scales(of_rows.writes_R, write_R, read_R), of_rows.spoiled_R


class _OfPicks(torch.autograd.Function):
    """The rows' scales as functions of those of the picks; spoiled rows have no gradient."""

    @staticmethod
    def forward(ctx, write_TP, read_TP, of_rows, has_resets):
        ctx.shape, ctx.has_resets = write_TP.shape, has_resets
        ctx.save_for_backward(of_rows.spoiled_rows_R)
        return of_rows.write_R, of_rows.read_R

    @staticmethod
    def backward(ctx, *grads):
        (spoiled_R,) = ctx.saved_tensors
        first = len(spoiled_R) - ctx.shape.numel()
        of_picks = (grad[first:] for grad in grads)
        if ctx.has_resets:
            of_picks = (grad.masked_fill(spoiled_R[first:], 0) for grad in of_picks)
        return *(grad.view(ctx.shape) for grad in of_picks), None, None
