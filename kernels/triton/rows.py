"""Which rows the kernels read, in which order, and how the work on them is cut.

Row t < T is token t as the shared bank sees it, row T + t * P + p is token t's pick p. Kernels walk the rows sorted by
segment and read tokens through `token_R`: what is gathered is never written to memory. What a row yields (outputs,
gradients) goes to its own place [T (1 + P), ...]; picks are summed afterwards, so nothing is added atomically.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sse.kernels.segments import Pieces, Segments, cut

CHUNK_SIZE = 64


@dataclass(frozen=True)
class Rows:
    """R = T (1 + P) rows sorted by segment; the shared bank's segments come first, at the positions 0 .. T - 1.

    num_tokens: T.
    row_R, token_R: int32, the row and the token that stand at each sorted position.
    chunks: the segments in chunks of CHUNK_SIZE rows, G of them.
    pieces: the segments in pieces of several chunks, M of them, the unit of the scan between them.
    chunk_M: int64, the first chunk of each piece.
    """

    num_tokens: int
    row_R: Tensor
    token_R: Tensor
    chunks: Pieces
    pieces: Pieces
    chunk_M: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What the operators take, behind their other inputs."""
        chunks, pieces = self.chunks, self.pieces
        spans = (chunks.start_G, chunks.end_G, pieces.start_G, pieces.end_G)
        return self.row_R, self.token_R, *spans, self.chunk_M


def make_rows(segments: Segments, num_tokens: int, num_picks: int, chunks_per_piece: int) -> Rows:
    """Rows of `segments` (row_T None: the shared bank alone, in order)."""
    num_rows = num_tokens * (1 + num_picks)
    device = segments.offsets_S1.device
    row_R = segments.row_T
    if row_R is None:
        row_R = torch.arange(num_rows, device=device)
    token_R = row_R
    if num_picks:
        token_R = torch.where(row_R < num_tokens, row_R, (row_R - num_tokens) // num_picks)
    chunks = cut(segments, num_rows, CHUNK_SIZE)
    pieces = cut(segments, num_rows, CHUNK_SIZE * chunks_per_piece)
    step_M = (pieces.start_G - segments.offsets_S1[pieces.segment_G]) // CHUNK_SIZE
    chunk_M = chunks.first_S[pieces.segment_G] + step_M
    return Rows(num_tokens, row_R.int(), token_R.int(), chunks, pieces, chunk_M)


def choose_chunks_per_piece(num_rows: int, programs_per_piece: int) -> int:
    """Chunks per piece, from sizes known on the host: enough pieces to fill a large GPU a few times, few states.

    programs_per_piece: how many programs share a piece (heads and blocks of the state).
    """
    wanted = max(1, 1024 // programs_per_piece)
    return max(4, -(-num_rows // (CHUNK_SIZE * wanted)))
