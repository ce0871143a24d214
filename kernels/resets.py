"""Documents that start inside a segment: from their first row on, nothing of the rows before counts, finite or not.

At a document's first row the state is emptied. Products cannot do that alone, since 0 * inf is nan. So states are
selected where a document starts, and a row with a value that is not finite takes no part in any product: rows of its
document from it on become nan afterwards.

For example, a segment with rows of the documents a a | b b b | c, where a is the span's first document: rows 2 and 5
reset the state.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# A number beyond it counts as not finite: sums of such numbers would be inf.
LIMIT = torch.finfo(torch.float32).max * 2.0**-20


@dataclass(frozen=True)
class Resets:
    """Where documents start inside the segments, at sorted positions.

    starts_R: bool, whether the state is emptied before the row. The span's first document is not a reset: it may
        continue a state that enters the span.
    count_R1: int64, the number of resets before each position.
    first_R: int64, the position of the first row of the same document and segment.
    emptied_S: bool, whether the span's last document has no row in the bank, so that its state there is empty. What is
        left after the segment's last row is then the state of another document.
    spoiled_R, spoiled_S: bool, whether a row of the same document and segment, up to this one, is not finite; the same
        for the segment's last row.
    """

    starts_R: Tensor
    count_R1: Tensor
    first_R: Tensor
    emptied_S: Tensor
    spoiled_R: Tensor
    spoiled_S: Tensor

    def inside(self, start: Tensor, end: Tensor) -> Tensor:
        """Return whether a document starts at one of the positions start .. end - 1; none does where end <= start."""
        # Unused chunks lie behind the last row.
        start, end = (x.clamp(max=len(self.count_R1) - 1) for x in (start, end))
        return self.count_R1[end] > self.count_R1[start]

    def spoil(self, bad_R: Tensor, offsets_S1: Tensor) -> "Resets":
        """Return the resets where the rows at the positions `bad_R` (bool) are not finite."""
        bad_R1 = pad(bad_R.cumsum(0), (1, 0))
        spoiled_R = bad_R1[1:] > bad_R1[self.first_R]
        spoiled_S = spoiled_R[(offsets_S1[1:] - 1).clamp(min=0)] & (offsets_S1.diff() > 0)
        return replace(self, spoiled_R=spoiled_R, spoiled_S=spoiled_S)


class PieceResets(NamedTuple):
    """Resets seen from pieces of segments.

    inside_M: bool, whether a document starts inside the piece, so that nothing which enters it leaves it.
    before_M: bool, whether one starts before the piece in its segment. inside_S: whether one starts in the segment.
    emptied_S, spoiled_S: as in Resets.
    """

    inside_M: Tensor
    before_M: Tensor
    inside_S: Tensor
    emptied_S: Tensor
    spoiled_S: Tensor

    def settle(self, state_S: Tensor) -> Tensor:
        """Return the states [S, H, K, V] after the spans' last documents, given those after the segments' last rows."""
        spoiled_S, emptied_S = (x[:, None, None, None] for x in (self.spoiled_S, self.emptied_S))
        return state_S.masked_fill(spoiled_S, torch.nan).masked_fill(emptied_S, 0)


def find_resets(document_R: Tensor, entering_R: Tensor, offsets_S1: Tensor, first_S: Tensor, last_S: Tensor) -> Resets:
    """Return the resets of segments, with no row spoiled.

    Args:
        document_R: int64, the document of the row at each sorted position.
        entering_R: int64, the first document of the row's span.
        offsets_S1: the segments' offsets over the positions.
        first_S, last_S: int64, the first and the last document of each segment's span.
    """
    num_rows = len(document_R)
    position_R = torch.arange(num_rows, device=document_R.device)
    opens_R = torch.zeros(num_rows + 1, dtype=torch.bool, device=document_R.device)
    # Empty segments open where the next one does; those at the end open behind the last row, at the entry left out.
    opens_R = opens_R.index_fill(0, offsets_S1[:-1], True)[:-1]
    starts_R = document_R != torch.where(opens_R, entering_R, document_R.roll(1))
    first_R = torch.where(starts_R | opens_R, position_R, 0).cummax(0).values
    # An empty segment hands on what entered it, which is the last document's only if that is the first as well.
    document_S = torch.where(offsets_S1.diff() > 0, document_R[(offsets_S1[1:] - 1).clamp(min=0)], first_S)
    none_R, none_S = torch.zeros_like(starts_R), torch.zeros_like(last_S, dtype=torch.bool)
    return Resets(starts_R, pad(starts_R.cumsum(0), (1, 0)), first_R, document_S != last_S, none_R, none_S)


def find_bad_rows(g: Tensor, *others: Tensor) -> Tensor:
    """Return which rows hold inf or nan, bool [R]; in log decays g [R, ...], -inf is a number like others.

    So does a number that comes close to the largest: sums of it would be inf, which no selection keeps apart.
    """
    bad_R = ~(g.detach().flatten(1).amax(1) < torch.inf)
    for x in others:
        limit = LIMIT if x.dtype != torch.float64 else torch.finfo(torch.float64).max * 2.0**-20
        # Both are nan where a value is, and are found faster than the largest absolute value.
        low_R, high_R = x.detach().flatten(1).amin(1), x.detach().flatten(1).amax(1)
        bad_R = bad_R | ~((low_R >= -limit) & (high_R <= limit))
    return bad_R
