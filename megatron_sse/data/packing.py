"""How documents are cut into samples and samples filled with documents.

Dims: D documents, P pieces (runs of neighbouring tokens of one document), S samples. A sample has `room` tokens: those
that the model reads and one more, which is the last one's label.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_sse.config import DataConfig

Pieces = list[tuple[int, int]]


@dataclass(frozen=True)
class Account:
    """What packing did. tokens, documents: of the file. padding: tokens of samples that hold none. dropped: tokens
    that are in no sample. split: documents that do not lie in one sample as a whole."""

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

    account: Account

    def pieces(self, sample: int) -> Pieces:
        """First token in the file and number of tokens of each piece, in the order in which they stand."""


def pack(data: DataConfig, offsets_D1: np.ndarray) -> Packing:
    """Samples of data.sequence_length + 1 tokens from documents whose tokens begin and end at `offsets_D1`."""
    room = data.sequence_length + 1
    if data.packing == "best_fit":
        return Packed(offsets_D1, best_fit(split_long(offsets_D1, room, data.long_documents == "continue"), room), room)
    if data.long_documents == "cut":
        return Packed(offsets_D1, cut_in_order(offsets_D1, room), room)
    return Windows(offsets_D1, room)


class Windows:
    """The tokens as they follow each other: a document that a sample's end cuts goes on in the next.

    Neighbours share one token, so that every token but the first is a label exactly once.
    """

    def __init__(self, offsets_D1: np.ndarray, room: int) -> None:
        self.offsets_D1, self.room = offsets_D1, room
        begin, end = int(offsets_D1[0]), int(offsets_D1[-1])
        samples = max(0, (end - begin - 1) // (room - 1))
        borders_S = begin + (room - 1) * np.arange(1, samples)
        document_S = np.searchsorted(offsets_D1, borders_S, side="right") - 1
        # The shared token belongs to both: a border at a document's last token cuts no labels off.
        inside_S = (offsets_D1[document_S] < borders_S) & (borders_S < offsets_D1[document_S + 1] - 1)
        used = samples * (room - 1) + 1 if samples else 0
        split = len(np.unique(document_S[inside_S]))
        self.account = Account(samples, end - begin, len(offsets_D1) - 1, 0, end - begin - used, split)

    def pieces(self, sample: int) -> Pieces:
        begin = int(self.offsets_D1[0]) + sample * (self.room - 1)
        low, high = np.searchsorted(self.offsets_D1, [begin, begin + self.room])
        bounds = [begin, *(int(offset) for offset in self.offsets_D1[low:high] if offset > begin), begin + self.room]
        return [(first, last - first) for first, last in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class PieceTable:
    """Pieces by their document, int64 [P]: its number, the first token in the file, the number of tokens, and, once
    they are packed, their sample."""

    document_P: np.ndarray
    begin_P: np.ndarray
    length_P: np.ndarray
    sample_P: np.ndarray


class Packed:
    """Pieces that were given their samples; what is left of a sample is padding."""

    def __init__(self, offsets_D1: np.ndarray, table: PieceTable, room: int) -> None:
        order_P = np.argsort(table.sample_P, kind="stable")
        samples = int(table.sample_P[order_P[-1]]) + 1 if len(order_P) else 0
        self.begin_P, self.length_P = table.begin_P[order_P], table.length_P[order_P]
        self.first_S1 = np.searchsorted(table.sample_P[order_P], np.arange(samples + 1))
        tokens, held = int(offsets_D1[-1] - offsets_D1[0]), int(table.length_P.sum())
        # The first token of a piece that goes on is also the last one of the piece before.
        shared = int((table.begin_P > offsets_D1[table.document_P]).sum())
        whole = int((table.length_P == np.diff(offsets_D1)[table.document_P]).sum())
        documents = len(offsets_D1) - 1
        padding, dropped = samples * room - held, tokens - (held - shared)
        self.account = Account(samples, tokens, documents, padding, dropped, documents - whole)

    def pieces(self, sample: int) -> Pieces:
        chosen = slice(self.first_S1[sample], self.first_S1[sample + 1])
        return list(zip(self.begin_P[chosen].tolist(), self.length_P[chosen].tolist(), strict=True))


def split_long(offsets_D1: np.ndarray, room: int, keep_rest: bool) -> PieceTable:
    """Documents as pieces of at most `room` tokens; of longer ones the rest is dropped, or continued by pieces that
    share one token with the one before, so that every token but the first is a label."""
    size_D = np.diff(offsets_D1)
    count_D = np.maximum(1, -(-(size_D - 1) // (room - 1))) if keep_rest else np.ones_like(size_D)
    document_P = np.repeat(np.arange(len(size_D)), count_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    skipped_P = number_P * (room - 1)
    length_P = np.minimum(room, size_D[document_P] - skipped_P)
    return PieceTable(document_P, offsets_D1[document_P] + skipped_P, length_P, np.zeros_like(document_P))


def cut_in_order(offsets_D1: np.ndarray, room: int) -> PieceTable:
    """Documents one after the other; what does not fit in a sample any more is dropped."""
    size_D = np.diff(offsets_D1)
    length_D, sample_D = np.zeros_like(size_D), np.zeros_like(size_D)
    sample, free = 0, room
    for document, size in enumerate(size_D.tolist()):
        # A single token would be no label.
        if free < min(size, 2):
            sample, free = sample + 1, room
        length_D[document], sample_D[document] = min(size, free), sample
        free -= min(size, free)
    return PieceTable(np.arange(len(size_D)), offsets_D1[:-1], length_D, sample_D)


def best_fit(table: PieceTable, room: int) -> PieceTable:
    """The longest piece first, each into the fullest sample that still has room for it (best-fit decreasing)."""
    sample_P = np.zeros_like(table.length_P)
    # Samples by their free tokens, and the sorted list of those numbers of free tokens that there are.
    samples_by_free: dict[int, list[int]] = {}
    there: list[int] = []
    samples = 0
    order_P = np.argsort(-table.length_P, kind="stable")
    for piece, length in zip(order_P.tolist(), table.length_P[order_P].tolist(), strict=True):
        at = bisect_left(there, length)
        if at < len(there):
            free = there[at]
            sample = samples_by_free[free].pop()
            if not samples_by_free[free]:
                del samples_by_free[free], there[at]
        else:
            free, sample = room, samples
            samples += 1
        sample_P[piece] = sample
        if free - length:
            if free - length not in samples_by_free:
                samples_by_free[free - length] = []
                insort(there, free - length)
            samples_by_free[free - length].append(sample)
    return replace(table, sample_P=sample_P)
