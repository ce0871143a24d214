"""`megatron-sse data inspect`: check a token file and show what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_sse.data.builder.encode import read_tokenizer
from megatron_sse.data.builder.request import BYTES
from megatron_sse.data.builder.summary import describe_metadata
from megatron_sse.data.checks import check_token_file
from megatron_sse.data.histogram import count_lengths, format_lengths
from megatron_sse.data.metadata import TOKENIZER, Metadata, read_metadata
from megatron_sse.data.request import Request
from megatron_sse.data.tokenizer import decode
from megatron_sse.errors import UserError
from megatron_sse.visible import make_visible

# Printed around tokens that count as labels.
_OPEN, _CLOSE = "\u27e6", "\u27e7"
# A vocabulary size that allows every token, for files without one.
_ANY_TOKEN = 1 << 31


def run(request: Request) -> int:
    """Check a token file and print what it holds; return the exit status. Raises UserError."""
    request.check()
    prefix, first = request.prefix, request.first
    metadata = read_metadata(prefix)
    file = check_token_file("PREFIX", prefix, _ANY_TOKEN if metadata is None else metadata.vocab_size)
    index = file.index
    count = len(index.offsets_D1) - 1
    print(f"{prefix}.bin: {index.bin_bytes:,} bytes, {index.dtype}")
    if metadata is None:
        print(f"{count:,} documents, {index.num_tokens:,} tokens; {prefix}.json not found: the tokenizer is unknown")
    else:
        for line in describe_metadata(metadata):
            print(make_visible(line))
    lengths_D = np.diff(index.offsets_D1)
    if not lengths_D.any():
        return 0
    empty = int((lengths_D == 0).sum())
    print(f"longest document {lengths_D.max():,} tokens, median {int(np.median(lengths_D)):,}; {empty:,} empty\n")
    for line in format_lengths(*count_lengths(lengths_D)):
        print(line)
    if request.documents and first >= count:
        raise UserError(f"--first: got {first}, allowed 0 to {count - 1}, the last document")
    to_text = _decoder(prefix, metadata)
    tokens_T = np.memmap(prefix + ".bin", dtype=index.dtype, mode="r")
    mask_T = None if file.mask_path is None else np.memmap(file.mask_path, dtype=np.uint8, mode="r")
    for number in range(first, min(first + request.documents, count)):
        begin, end = (int(offset) for offset in index.offsets_D1[number : number + 2])
        print(f"\n--- document {number}: {end - begin:,} tokens")
        shown = slice(begin, min(begin + request.tokens, end))
        print(_show(tokens_T[shown], None if mask_T is None else mask_T[shown], to_text))
        if shown.stop < end:
            print(f"... ({end - shown.stop:,} more)")
    return 0


def _decoder(prefix: str, metadata: Metadata | None) -> Callable[[np.ndarray], str]:
    """Return a function from tokens to text; it writes numbers where the tokenizer is unknown."""
    path = Path(f"{prefix}.{TOKENIZER}")
    if path.is_file():
        tokenizer = read_tokenizer(path)
        return lambda tokens_T: tokenizer.decode(tokens_T.tolist(), skip_special_tokens=False)
    if metadata is not None and metadata.tokenizer == BYTES:
        return decode
    return lambda tokens_T: "".join(f"{token} " for token in tokens_T)


def _show(tokens_T: np.ndarray, mask_T: np.ndarray | None, to_text: Callable[[np.ndarray], str]) -> str:
    if mask_T is None:
        return make_visible(to_text(tokens_T))
    return "".join(
        f"{_OPEN}{make_visible(to_text(run_T))}{_CLOSE}" if counts else make_visible(to_text(run_T))
        for counts, run_T in _runs(tokens_T, mask_T)
    )


def _runs(tokens_T: np.ndarray, mask_T: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
    """Yield runs of neighbouring tokens that all count or all do not."""
    borders = [0, *(np.flatnonzero(np.diff(mask_T)) + 1).tolist(), len(tokens_T)]
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        yield bool(mask_T[begin]), tokens_T[begin:end]
