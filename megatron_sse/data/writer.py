"""Writing token files in Megatron's format; they appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_sse.data.index_format import DTYPES, HEADER, MAGIC, VERSION
from megatron_sse.durable import fsync

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 20
INDEX = ".idx"


def write_index(path: Path, dtype: np.dtype, num_documents: int, lengths: Iterable[np.ndarray]) -> None:
    """Write an index in which each document is one sequence.

    After the header it holds the length of each sequence (int32), its offset in the .bin in bytes (int64), and the
    first sequence of each document and one past the last (int64).

    lengths: int32, of all documents in pieces; it is iterated twice, so an iterator will not do.
    """
    with path.open("wb") as file:
        file.write(MAGIC + HEADER.pack(VERSION, _CODES[dtype], num_documents, num_documents + 1))
        for lengths_D in lengths:
            file.write(lengths_D.astype(np.int32).data)
        first = 0
        for lengths_D in lengths:
            ends_D = first + np.cumsum(lengths_D, dtype=np.int64)
            file.write(((ends_D - lengths_D) * dtype.itemsize).data)
            first = int(ends_D[-1]) if len(ends_D) else first
        for begin, end in _ranges(num_documents + 1):
            file.write(np.arange(begin, end, dtype=np.int64).data)


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _PIECE):
        yield begin, min(begin + _PIECE, count)


def publish(folder: Path, prefix: Path) -> None:
    """Move files named by their suffixes (.bin, .json, ...) to the prefix.

    The index comes last: a token file exists once it has its index.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == INDEX, name))
    for name in names:
        fsync(folder / name)
    for name in names:
        os.replace(folder / name, f"{prefix}{name}")
    fsync(prefix.parent)


def copy_into(target: IO[bytes], source: Path) -> None:
    """Append the content of `source` to `target`."""
    with source.open("rb") as file:
        while block := file.read(_PIECE * 16):
            target.write(block)
