"""Which keys the queries of a context rank see: pieces that softmax attention takes one after the other."""

from itertools import pairwise

import numpy as np

from megatron_sse.kernels.attention import Piece
from megatron_sse.parallel.sharding import ContextShard

# Least queries of a piece under a window: smaller ones would cost more calls than they save work.
WINDOWED_QUERIES = 128
# Most pairs of a query and a key in a piece under a window, which takes a mask of them: 16 MiB in fp32.
WINDOWED_PAIRS = 1 << 22


def cut_pieces(starts_BE: np.ndarray, shard: ContextShard, window: int | None) -> list[Piece]:
    """Return pieces that cover this rank's queries; keys are those of the whole sequence, in its order.

    A piece is a document's part in one slot, or of that as many queries as a window makes worth while. Sequences with
    equal documents go together.

    Args:
        starts_BE: bool, where documents start in the full sequences; each starts one.
        window: tokens that a token sees, its own included.
    """
    length = starts_BE.shape[1]
    if (starts_BE == starts_BE[:1]).all():
        rows = [(slice(None), starts_BE[0])]
    else:
        rows = [(slice(row, row + 1), starts) for row, starts in enumerate(starts_BE)]
    slots = shard.columns(length).reshape(shard.num_slots, -1)
    pieces = []
    for sequences, starts in rows:
        start_E = np.maximum.accumulate(np.where(starts, np.arange(length), 0))
        for slot, columns in enumerate(slots):
            begin, end = int(columns[0]), int(columns[-1]) + 1
            # From a column of the sequence to this rank's tokens.
            shift = slot * len(columns) - begin
            inside = (np.flatnonzero(starts[begin + 1 : end]) + begin + 1).tolist()
            for first, last in pairwise([begin, *inside, end]):
                start = int(start_E[first])
                step = last - first
                if window is not None and last - start > window:
                    # Keys are fewer than step + window, so that there are at most WINDOWED_PAIRS pairs.
                    step = max(1, min(max(window, WINDOWED_QUERIES), WINDOWED_PAIRS // (2 * window)))
                for at in range(first, last, step):
                    stop = min(at + step, last)
                    from_key = start if window is None else max(start, at - window + 1)
                    pieces.append(Piece(sequences, slice(at + shift, stop + shift), slice(from_key, stop)))
    return pieces
