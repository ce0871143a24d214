"""Packing: how documents are cut into pieces and samples filled with pieces.

p counts pieces here: runs of neighbouring tokens of one document. A sample has `room` tokens: those that the model
reads and one more, which is the label of the last. The examples below use room = 5.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from megatron_sse.config import DataConfig
from megatron_sse.data.made import Made, MadeFolder

Pieces = list[tuple[int, int]]


@dataclass(frozen=True)
class Account:
    """The result of packing in numbers.

    tokens, documents: of the file. padding: places in samples without a token. dropped: tokens that are in no sample.
    split: documents that do not lie complete in one sample.
    """

    samples: int
    tokens: int
    documents: int
    padding: int
    dropped: int
    split: int

    def __str__(self) -> str:
        held = self.tokens - self.dropped + self.padding
        shares = (
            (self.padding, held, "padding"),
            (self.split, self.documents, "of documents cut or continued"),
            (self.dropped, self.tokens, "of tokens dropped"),
        )
        text = ", ".join(f"{100 * part / max(whole, 1):.3g} % {name}" for part, whole, name in shares)
        return f"{self.samples:,} samples, {text}"


class Packing(Protocol):
    """Which tokens of a file each sample holds."""

    @property
    def account(self) -> Account: ...

    def pieces(self, sample: int) -> Pieces:
        """Return each piece's first token in the file and number of tokens, in their order in the sample."""


def pack(data: DataConfig, offsets_D1: np.ndarray, made: MadeFolder = MadeFolder()) -> Packing:  # noqa: B008
    """Return samples of data.sequence_length + 1 tokens from documents whose tokens begin and end at `offsets_D1`.

    made: where the result is kept.
    """
    room = data.sequence_length + 1
    first, last = int(offsets_D1[0]), int(offsets_D1[-1])

    def fill() -> Made:
        if data.packing == "best_fit":
            table = best_fit(split_long(offsets_D1, room, data.long_documents == "continue"), room)
        else:
            table = cut_in_order(offsets_D1, room)
        return fill_samples(offsets_D1, table, room)

    if data.packing == "in_order" and data.long_documents == "continue":
        return Windows(offsets_D1, room)
    kept = made.get(f"{data.packing}-{data.long_documents}-{room}-{first}-{last}", fill)
    return Packed(**kept.arrays, account=Account(**kept.facts))


class Windows:
    """Samples of consecutive tokens: a document that the end of a sample cuts continues in the next.

    Neighbouring samples share one token, so that every token but the first is a label exactly once: with documents of 3
    and 7 tokens, sample 0 holds tokens 0 to 4 (pieces of 3 and 2), sample 1 holds 4 to 8, and token 9 is dropped.
    """

    def __init__(self, offsets_D1: np.ndarray, room: int) -> None:
        self.offsets_D1, self.room = offsets_D1, room
        begin, end = int(offsets_D1[0]), int(offsets_D1[-1])
        samples = max(0, (end - begin - 1) // (room - 1))
        borders_n = begin + (room - 1) * np.arange(1, samples)
        document_n = np.searchsorted(offsets_D1, borders_n, side="right") - 1
        # The token at a border is in both samples: a document is cut only where the border is neither its first token
        # (then it is complete in the later sample) nor its last (complete in the earlier one).
        inside_n = (offsets_D1[document_n] < borders_n) & (borders_n < offsets_D1[document_n + 1] - 1)
        used = samples * (room - 1) + 1 if samples else 0
        split = len(np.unique(document_n[inside_n]))
        self.account = Account(samples, end - begin, len(offsets_D1) - 1, 0, end - begin - used, split)

    def pieces(self, sample: int) -> Pieces:
        begin = int(self.offsets_D1[0]) + sample * (self.room - 1)
        low, high = np.searchsorted(self.offsets_D1, [begin, begin + self.room])
        bounds = [begin, *(int(offset) for offset in self.offsets_D1[low:high] if offset > begin), begin + self.room]
        return [(first, last - first) for first, last in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class PieceTable:
    """Pieces in the order of their documents, [p] each: begin_p int64, the others int32 where they fit.

    document_p: number of the document. begin_p: first token in the file. length_p: number of tokens. sample_p: the
    sample that holds the piece, set when it is packed.
    """

    document_p: np.ndarray
    begin_p: np.ndarray
    length_p: np.ndarray
    sample_p: np.ndarray


@dataclass(frozen=True)
class Packed:
    """Samples made of pieces; the rest of each sample is padding.

    begin_p, length_p: as in PieceTable, sorted by sample. first_n1: each sample's first piece, and the number of all.
    """

    begin_p: np.ndarray
    length_p: np.ndarray
    first_n1: np.ndarray
    account: Account

    def pieces(self, sample: int) -> Pieces:
        chosen = slice(self.first_n1[sample], self.first_n1[sample + 1])
        return list(zip(self.begin_p[chosen].tolist(), self.length_p[chosen].tolist(), strict=True))


def fill_samples(offsets_D1: np.ndarray, table: PieceTable, room: int) -> Made:
    """Return the arrays of a Packed, and its account, from pieces that know their sample."""
    # Pieces sorted by sample, and where each sample's begin: for sample_p 1 0 1, order 1 0 2 and first 0 1 3.
    order_p = np.argsort(table.sample_p, kind="stable")
    samples = int(table.sample_p[order_p[-1]]) + 1 if len(order_p) else 0
    first_n1 = np.searchsorted(table.sample_p[order_p], np.arange(samples + 1))
    tokens, held = int(offsets_D1[-1] - offsets_D1[0]), int(table.length_p.sum())
    # A piece that continues a document starts with the last token of the piece before: it is held twice.
    shared = int((table.begin_p > offsets_D1[table.document_p]).sum())
    whole = int((table.length_p == np.diff(offsets_D1)[table.document_p]).sum())
    documents = len(offsets_D1) - 1
    padding, dropped = samples * room - held, tokens - (held - shared)
    account = Account(samples, tokens, documents, padding, dropped, documents - whole)
    arrays = {
        "begin_p": table.begin_p[order_p],
        "length_p": table.length_p[order_p].astype(np.int64),
        "first_n1": first_n1,
    }
    return Made(arrays, asdict(account))


def split_long(offsets_D1: np.ndarray, room: int, keep_rest: bool) -> PieceTable:
    """Cut documents into pieces of at most `room` tokens.

    The rest of a longer document is dropped or (keep_rest) becomes further pieces. Each of these starts with the last
    token of the piece before, so that every token but the first is a label: a document of 10 tokens becomes the pieces
    0 to 4, 4 to 8 and 8 to 9.
    """
    size_D = _narrow(np.diff(offsets_D1))
    # Each piece adds room - 1 tokens to the first token of its document.
    count_D = np.maximum(1, -(-(size_D - 1) // (room - 1))) if keep_rest else np.ones_like(size_D)
    document_p = np.repeat(_narrow(np.arange(len(size_D))), count_D)
    # A piece's number in its document: for counts 1 3 2, pieces 0 | 0 1 2 | 0 1.
    number_p = np.arange(len(document_p)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    del count_D
    begin_p = number_p * (room - 1)
    del number_p
    length_p = np.minimum(room, size_D[document_p] - begin_p)
    begin_p += offsets_D1[document_p]
    return PieceTable(document_p, begin_p, _narrow(length_p), np.zeros_like(document_p))


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Return int32 for numbers below 2^31: tables of millions of pieces are half as large."""
    return numbers.astype(np.int32) if not len(numbers) or numbers.max() < 1 << 31 else numbers


def cut_in_order(offsets_D1: np.ndarray, room: int) -> PieceTable:
    """Put documents into samples one after the other; drop the rest of a document that does not fit.

    Documents of 3, 4 and 2 tokens: sample 0 holds 3 and the first 2 of the second document, sample 1 the third.
    """
    size_D = np.diff(offsets_D1)
    length_D, sample_D = np.zeros_like(size_D), np.zeros_like(size_D)
    sample, free = 0, room
    for document, size in enumerate(size_D.tolist()):
        # A piece of one token would have no label, so at least two (or the full document) have to fit.
        if free < min(size, 2):
            sample, free = sample + 1, room
        length_D[document], sample_D[document] = min(size, free), sample
        free -= min(size, free)
    return PieceTable(np.arange(len(size_D)), offsets_D1[:-1], length_D, sample_D)


def best_fit(table: PieceTable, room: int) -> PieceTable:
    """Put the longest piece first, each into the fullest sample that still has room for it (best-fit decreasing).

    Pieces of 3, 2, 4 and 1 tokens: 4 opens sample 0, 3 opens sample 1, 2 fills sample 1, and 1 fills sample 0.
    """
    order_p = np.argsort(-table.length_p, kind="stable")
    length_p = table.length_p[order_p]
    begins = np.flatnonzero(np.diff(length_p, prepend=-1)).tolist()
    # The sample of each piece of order_p; pieces of one length are placed together.
    placed_p = np.empty_like(table.sample_p)
    # Open samples by their free tokens, and the keys of this dictionary as a sorted list: the smallest key that is at
    # least a piece's length is found by bisection. The sample that came last is filled first.
    samples_by_free: dict[int, array[int]] = {}
    there: list[int] = []
    samples = 0

    def keep(opened: array[int], free: int) -> None:
        if not free or not opened:
            return
        if free not in samples_by_free:
            samples_by_free[free] = array("q")
            insort(there, free)
        samples_by_free[free].extend(opened)

    for begin, end in pairwise([*begins, len(length_p)]):
        length = int(length_p[begin])
        while begin < end:
            at = bisect_left(there, length)
            free = there[at] if at < len(there) else room
            # So many of these pieces go into each sample, one after the other.
            each = free // length if length else end - begin
            needed = -(-(end - begin) // each)
            if at < len(there):
                chosen = samples_by_free[free][: -needed - 1 : -1]
                del samples_by_free[free][-needed:]
                if not samples_by_free[free]:
                    del samples_by_free[free], there[at]
            else:
                chosen = array("q", range(samples, samples + needed))
                samples += needed
            count = min(len(chosen) * each, end - begin)
            placed_p[begin : begin + count] = np.repeat(chosen, each)[:count]
            begin += count
            keep(chosen[:-1], free - each * length)
            keep(chosen[-1:], free - (count - (len(chosen) - 1) * each) * length)
    sample_p = np.empty_like(placed_p)
    sample_p[order_p] = placed_p
    return replace(table, sample_p=sample_p)
