"""The part made of a unit: its tokens, lengths and counts in a folder that appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_sse.data.builder.inputs import Unit
from megatron_sse.data.builder.job import Document, DocumentMaker
from megatron_sse.data.builder.read import read_unit
from megatron_sse.data.builder.tally import Tally
from megatron_sse.durable import fsync
from megatron_sse.errors import UserError

TOKENS, LENGTHS, MASK, FREQUENCIES, COUNTS = "tokens", "lengths", "mask", "frequencies", "counts.json"
# Megatron's index holds lengths as 32-bit numbers.
_MAX_LENGTH = (1 << 31) - 1
_FLUSH_TOKENS = 1 << 20


@dataclass
class Counts:
    """Counts of a part or of a token file.

    Attributes:
        bytes: of text.
        left_out: skipped input, by kind.
        lengths, length_tokens: documents, and their tokens, by power of two: lengths[k] counts documents of 2^k to
            2^(k+1) - 1 tokens.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    label_tokens: int = 0
    label_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    length_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, document: Document) -> None:
        """Count a document."""
        length = len(document.tokens_T)
        self.documents += 1
        self.tokens += length
        self.bytes += document.num_bytes
        self.label_bytes += document.label_bytes
        if document.mask_T is not None:
            self.label_tokens += int(document.mask_T.sum())
        power = length.bit_length() - 1
        self.lengths[power] += 1
        self.length_tokens[power] += length

    def merge(self, other: Counts) -> None:
        """Add the counts of another part."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counts:
        def numbered(name: str) -> Counter[int]:
            return Counter({int(key): value for key, value in values[name].items()})

        counters = {"left_out": Counter(values["left_out"])}
        return cls(**{**values, **counters, "lengths": numbered("lengths"), "length_tokens": numbered("length_tokens")})


def part_folder(building: Path, number: int) -> Path:
    return building / f"part-{number:06d}"


def build_part(building: Path, number: int, unit: Unit, maker: DocumentMaker, report: Callable[[int], None]) -> None:
    """Read a unit and write its part. report: is called with the bytes read. Raises UserError and OSError."""
    tally = Tally(maker.job.refused)
    with PartWriter(building, number, maker.encoder.vocab_size, maker.job.has_mask) as part:
        for place, record in read_unit(unit, maker.job.columns, tally, report):
            document = maker.make(place, record, tally)
            if document is None:
                continue
            if len(document.tokens_T) > _MAX_LENGTH:
                raise UserError(f"{place}: {len(document.tokens_T)} tokens, allowed {_MAX_LENGTH} in a document")
            part.add(document)
        part.finish(tally)


class PartWriter:
    """A writer of a part's files.

    They are tokens and mask as in the token file, int32 lengths, int64 frequencies [vocab] of the tokens that count as
    labels, and counts.
    """

    def __init__(self, building: Path, number: int, vocab_size: int, has_mask: bool):
        self.folder = part_folder(building, number)
        # The process id keeps apart a worker that outlived its build and still writes the same part.
        self.partial = building / f"partial-{number:06d}-{os.getpid()}"
        self.frequencies_v = np.zeros(vocab_size, dtype=np.int64)
        self.counts = Counts()
        self.pending: list[Document] = []
        self.num_pending = 0
        self.partial.mkdir(parents=True)
        names = [TOKENS, LENGTHS] + [MASK] * has_mask
        self.files = {name: (self.partial / name).open("wb") for name in names}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, document: Document) -> None:
        """Append a document."""
        self.counts.add(document)
        self.pending.append(document)
        self.num_pending += len(document.tokens_T)
        if self.num_pending >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        lengths_D = np.array([len(document.tokens_T) for document in self.pending], dtype=np.int32)
        tokens_T = np.concatenate([document.tokens_T for document in self.pending])
        self.files[LENGTHS].write(lengths_D.data)
        self.files[TOKENS].write(tokens_T.data)
        if MASK in self.files:
            mask_T = np.concatenate([document.mask_T for document in self.pending if document.mask_T is not None])
            self.files[MASK].write(mask_T.data)
            tokens_T = tokens_T[mask_T == 1]
        # In pieces, since bincount converts its input to 64-bit numbers.
        for first in range(0, len(tokens_T), _FLUSH_TOKENS):
            piece_T = tokens_T[first : first + _FLUSH_TOKENS]
            self.frequencies_v += np.bincount(piece_T, minlength=len(self.frequencies_v))
        self.pending, self.num_pending = [], 0

    def finish(self, tally: Tally) -> None:
        """Write what is pending, and rename the folder to its final name."""
        self._flush()
        self.counts.left_out = tally.counts
        np.save(self.partial / f"{FREQUENCIES}.npy", self.frequencies_v)
        (self.partial / COUNTS).write_text(json.dumps(self.counts.to_json()))
        for file in self.files.values():
            file.close()
        for path in self.partial.iterdir():
            fsync(path)
        try:
            self.partial.rename(self.folder)
        except OSError:
            if not self.folder.exists():
                raise
