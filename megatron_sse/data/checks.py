"""Checks of token files before they are used: a wrong one is refused with an error of one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_sse.data.index_format import DTYPES, HEADER, MAGIC, VERSION
from megatron_sse.data.made import Made, MadeFolder, made_folder
from megatron_sse.data.metadata import read_metadata
from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

HEADER_BYTES = len(MAGIC) + HEADER.size
# In larger files only the first and last half of this many bytes are checked, so that a run starts within seconds.
CHECKED_BYTES = 1 << 28
CHUNK_TOKENS = 1 << 22


@dataclass
class Index:
    """The content of <prefix>.idx: token dtype, bytes of the .bin, and offsets [D + 1] of its documents in tokens."""

    dtype: np.dtype
    bin_bytes: int
    offsets_D1: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.offsets_D1[-1])


@dataclass(frozen=True)
class TokenFile:
    """A checked file, or a part of it: the documents whose tokens begin and end at `offsets_D1`.

    mask_path: the loss mask's file, uint8 per token, 1 where the token counts as a label; None where all count.
    made: for what is worked out of the file.
    """

    prefix: str
    index: Index
    offsets_D1: np.ndarray
    mask_path: Path | None
    made: MadeFolder = MadeFolder()


def check_token_file(key: str, prefix: str, vocab_size: int) -> TokenFile:
    """Check the file that the setting `key` names, and return it. Raises UserError."""
    check_exists(key, prefix)
    made = made_folder(prefix)
    kept = made.get("index", partial(_make_index, prefix))
    index = Index(np.dtype(kept.facts["dtype"]), kept.facts["bin_bytes"], kept.arrays["offsets"])
    bin_path = Path(prefix + ".bin")
    size = bin_path.stat().st_size
    if size != index.bin_bytes:
        raise UserError(
            f"{bin_path}: {size} bytes, its index says {index.bin_bytes}; the file is truncated or belongs to another "
            "index, build it again"
        )
    metadata = read_metadata(prefix)
    if metadata is not None and metadata.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} given, but {prefix}.json says {metadata.vocab_size} "
            f"(tokenizer {metadata.tokenizer}); set model.vocab_size: {metadata.vocab_size}"
        )
    if not 0 <= kept.facts["lowest"] <= kept.facts["highest"] < vocab_size:
        check_token_ids(key, bin_path, index.dtype, vocab_size)
    mask = Path(prefix + ".mask") if metadata is not None and metadata.loss_mask else None
    if mask is not None and (not mask.is_file() or mask.stat().st_size != index.num_tokens):
        raise UserError(f"{mask}: missing, or not {index.num_tokens} bytes (one per token); build {prefix} again")
    return TokenFile(prefix, index, index.offsets_D1, mask, made)


def _make_index(prefix: str) -> Made:
    """Return a checked index, and the lowest and highest token ids of the file (of the ranges that are checked)."""
    index = read_index(Path(prefix + ".idx"))
    lowest = highest = 0
    bin_path = Path(prefix + ".bin")
    # A file of another size is refused by whoever asked.
    if index.num_tokens and bin_path.stat().st_size == index.bin_bytes:
        for _, chunk_T in _checked_chunks(bin_path, index.dtype):
            lowest, highest = min(lowest, int(chunk_T.min())), max(highest, int(chunk_T.max()))
    facts = {"dtype": index.dtype.str, "bin_bytes": index.bin_bytes, "lowest": lowest, "highest": highest}
    return Made({"offsets": index.offsets_D1}, facts)


def check_exists(key: str, prefix: str) -> None:
    """Raise UserError unless both files of a prefix exist."""
    for suffix in (".idx", ".bin"):
        if Path(prefix + suffix).is_file():
            continue
        if Path(prefix).suffix in (".idx", ".bin") and Path(prefix).is_file():
            raise UserError(f"{key}: {prefix} given, give it without {Path(prefix).suffix}")
        hint = ", or set data.corpus: python_stdlib to build one" if suffix == ".idx" else ""
        raise UserError(f"{key}: {prefix}{suffix} not found; give the common prefix of a .bin and a .idx file{hint}")


def read_index(path: Path) -> Index:
    """Read and check an index in Megatron's format, version 1. Raises UserError."""
    header = path.open("rb").read(HEADER_BYTES)
    magic = header[: len(MAGIC)]
    if magic != MAGIC:
        raise UserError(f"{path}: not an index of a Megatron token file (starts with {magic!r}, not {MAGIC!r})")
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path}: {len(header)} bytes, the header alone has {HEADER_BYTES}; truncated, build it again")
    version, code, sequences, documents = HEADER.unpack(header[len(MAGIC) :])
    if version != VERSION:
        raise UserError(f"{path}: index version {version}, only version {VERSION} can be read")
    if code not in DTYPES:
        raise UserError(f"{path}: token dtype code {code} is not that of an integer type; build it again")
    expected = HEADER_BYTES + 12 * sequences + 8 * documents
    if path.stat().st_size not in (expected, expected + sequences):
        raise UserError(f"{path}: {path.stat().st_size} bytes, its header says {expected}; truncated, build it again")
    dtype = DTYPES[code]
    with path.open("rb") as stream:
        stream.seek(HEADER_BYTES)
        lengths_p = np.fromfile(stream, np.int32, sequences)
        pointers_p = np.fromfile(stream, np.int64, sequences)
        bounds_D1 = np.fromfile(stream, np.int64, documents)
    offsets_p1 = np.concatenate([[0], np.cumsum(lengths_p, dtype=np.int64)])
    if (lengths_p < 0).any() or not np.array_equal(pointers_p, offsets_p1[:-1] * dtype.itemsize):
        raise UserError(f"{path}: sequences do not follow each other in the .bin file; build it again")
    if len(bounds_D1) < 2 or bounds_D1[0] != 0 or bounds_D1[-1] != sequences or (np.diff(bounds_D1) < 0).any():
        raise UserError(f"{path}: document bounds do not cover the {sequences} sequences in order; build it again")
    return Index(dtype, int(offsets_p1[-1]) * dtype.itemsize, offsets_p1[bounds_D1])


def check_token_ids(key: str, path: Path, dtype: np.dtype, vocab_size: int) -> None:
    """Raise UserError where a token is not in 0 to vocab_size - 1."""
    for first, chunk_T in _checked_chunks(path, dtype):
        if chunk_T.max() < vocab_size and chunk_T.min() >= 0:
            continue
        place = int(np.argmax((chunk_T >= vocab_size) | (chunk_T < 0)))
        raise UserError(
            f"{key}: {path} holds token id {chunk_T[place]} at token {first + place}, allowed are 0 to "
            f"model.vocab_size - 1 = {vocab_size - 1}; set model.vocab_size to that of the tokenizer"
        )


def _checked_chunks(path: Path, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the tokens whose ids are checked, in chunks, with the place of each chunk's first token."""
    tokens_T = np.memmap(path, dtype=dtype, mode="r")
    ranges = [(0, len(tokens_T))]
    if tokens_T.nbytes > CHECKED_BYTES:
        half = CHECKED_BYTES // (2 * dtype.itemsize)
        ranges = [(0, half), (len(tokens_T) - half, len(tokens_T))]
        logger.info("%s: token ids checked in the first and last %d of %d tokens", path, half, len(tokens_T))
    for begin, end in ranges:
        for first in range(begin, end, CHUNK_TOKENS):
            yield first, tokens_T[first : min(first + CHUNK_TOKENS, end)]
