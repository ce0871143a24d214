"""Joining parts into one token file, in the order of the units and a block at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_sse.data.builder.encode import token_type
from megatron_sse.data.builder.parts import COUNTS, FREQUENCIES, LENGTHS, MASK, TOKENS, Counts, part_folder
from megatron_sse.data.metadata import Metadata
from megatron_sse.data.writer import copy_into, write_index

_PIECE_LENGTHS = 1 << 20


class _Lengths:
    """The lengths of the documents of all parts, in pieces; it can be iterated several times."""

    def __init__(self, parts: list[Path]):
        self.parts = parts

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            with (part / LENGTHS).open("rb") as file:
                while len(lengths_D := np.fromfile(file, np.int32, _PIECE_LENGTHS)):
                    yield lengths_D


def count_parts(building: Path, num_parts: int) -> Counts:
    """Return the sum of the counts of all parts."""
    total = Counts()
    for number in range(num_parts):
        values = json.loads((part_folder(building, number) / COUNTS).read_text())
        total.merge(Counts.from_json(values))
    return total


def join_parts(
    building: Path,
    num_parts: int,
    joined: Path,
    counts: Counts,
    tokenizer: str,
    end: int,
    has_mask: bool,
    report: Callable[[int], None],
) -> None:
    """Write .bin, .mask, .json and .idx into `joined`. report: is called with the bytes written. Raises OSError."""
    parts = [part_folder(building, number) for number in range(num_parts)]
    frequencies_v = sum(np.load(part / f"{FREQUENCIES}.npy") for part in parts)
    vocab_size = len(frequencies_v)
    for name, suffix in [(TOKENS, ".bin")] + [(MASK, ".mask")] * has_mask:
        with (joined / suffix).open("wb") as target:
            for part in parts:
                before = target.tell()
                copy_into(target, part / name)
                report(target.tell() - before)
    num_bytes = counts.label_bytes if has_mask else counts.bytes
    Metadata(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        documents=counts.documents,
        tokens=counts.tokens,
        bytes=counts.bytes,
        unigram_bits_per_byte=unigram_bits(frequencies_v) / num_bytes,
        loss_mask=has_mask,
        label_tokens=counts.label_tokens if has_mask else None,
        label_bytes=counts.label_bytes if has_mask else None,
        end=end,
    ).write(joined / ".json")
    write_index(joined / ".idx", token_type(vocab_size), counts.documents, _Lengths(parts))


def unigram_bits(frequencies_v: np.ndarray) -> float:
    """Return the bits of a text whose tokens are coded by their frequencies in it."""
    counted = frequencies_v[frequencies_v > 0].astype(np.float64)
    return float((counted * (np.log2(counted.sum()) - np.log2(counted))).sum())
