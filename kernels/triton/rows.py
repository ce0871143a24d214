"""Which rows the kernels read, in which order, and how the work on them is cut.

Row t < T is token t as the shared bank sees it, row T + t * P + p is token t's pick p. Kernels walk the rows sorted by
segment and read tokens through `token_R`, so that gathered rows are never written to memory. A row's results (outputs,
gradients) go to its own place [T (1 + P), ...]; picks are summed afterwards, so nothing is added atomically.

For example, 3 tokens with one pick each, in the banks 1, 0, 1: rows 0 1 2 are the shared bank's, rows 3 4 5 the picks.
Sorted: row_R 0 1 2 | 4 | 3 5 (shared bank, bank 0, bank 1) and token_R 0 1 2 | 1 | 0 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.segments import Pieces, Segments, cut


@dataclass(frozen=True)
class Rows:
    """R = T (1 + P) rows sorted by segment; the shared bank's segments come first, at the positions 0 .. T - 1.

    num_tokens: T.
    row_R, token_R: int32, the row and the token at each sorted position; the token is -1 for spoiled rows (see
        kernels.resets), which kernels read as zeros.
    run_R: int32, how many documents have started inside segments up to this position. Rows of one chunk with the same
        number are of the same document.
    chunks: the segments in chunks of CHUNK_SIZE rows, G of them.
    pieces: the segments in pieces of several chunks, M of them, the unit of the scan between them.
    chunk_M: int64, the first chunk of each piece.
    """

    num_tokens: int
    row_R: Tensor
    token_R: Tensor
    run_R: Tensor
    chunks: Pieces
    pieces: Pieces
    chunk_M: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tables that the operators take after their other inputs."""
        chunks, pieces = self.chunks, self.pieces
        spans = (chunks.start_M, chunks.end_M, pieces.start_M, pieces.end_M)
        return self.row_R, self.token_R, self.run_R, *spans, self.chunk_M


def make_rows(segments: Segments, num_tokens: int, num_picks: int, chunks_per_piece: int) -> Rows:
    """Make the rows of `segments` (where its row_R is None: the shared bank alone, in order)."""
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
    return Rows(num_tokens, row_R.int(), token_R.int(), run_R.int(), chunks, pieces, chunk_M)
