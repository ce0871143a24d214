"""Loss by position, which shows how much a model gains from earlier tokens.

Documents are cut into pieces of a given length. Each shares one token with the piece before it, so that every token but
a document's first is predicted exactly once at each length, from the tokens before it in its piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from megatron_sse.config import RunConfig
from megatron_sse.data.checks import TokenFile, check_token_file
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.sources import split_file
from megatron_sse.errors import UserError
from megatron_sse.evaluation.read import Reader


@dataclass(frozen=True)
class Bucket:
    """Loss, in nats per token, of the tokens that have `first` to 2 x `first` - 1 tokens of their piece before them.

    error: its standard error, by the number of tokens and the spread of their losses; tokens that resemble each other
    make it larger than this.
    """

    first: int
    tokens: int
    loss: float
    error: float


@dataclass(frozen=True)
class Losses:
    """Losses on a file's first tokens, in pieces of `length` tokens.

    loss: nats per token. bits_per_byte: the same, by the file's mean number of bytes per token; None where its
    metadata lacks that.
    """

    file: str
    length: int
    tokens: int
    loss: float
    bits_per_byte: float | None
    buckets: list[Bucket]


def validation_files(config: RunConfig, prefix: str | None) -> list[TokenFile]:
    """Return the checked file at a prefix. Raises UserError.

    Without a prefix, these are the model's validation files or the held-out part of its training files.
    """
    data, vocab_size = config.data, config.model.vocab_size
    if prefix is not None:
        return [check_token_file("--data", prefix, vocab_size)]
    key = "data.validation" if data.validation is not None else "data.train"
    sources = data.validation or (data.train if data.validation_share else [])
    files = [check_token_file(key, source.prefix, vocab_size) for source in sources if source.prefix]
    if not files:
        raise UserError("--data: got nothing, allowed a token file's prefix: the model has no validation data")
    return files if data.validation is not None else [split_file(file, data.validation_share)[1] for file in files]


def measure_losses(reader: Reader, file: TokenFile, length: int, num_tokens: int) -> Losses:
    """Return the losses on the first `num_tokens` tokens of a file; only tokens that its loss mask keeps count."""
    pieces, counted = cut_documents(file, length, num_tokens)
    # The last token of a piece is a label only.
    fed = [tokens[:-1] for tokens in pieces]
    labels_T = np.concatenate([tokens[1:] for tokens in pieces]) if pieces else np.zeros(0, dtype=np.int64)
    # begin_p1: where the labels of each piece start in labels_T.
    begin_p1 = np.cumsum([0, *map(len, fed)])
    sums_b, squares_b, counts_b = np.zeros((3, 64))
    for sequence_w, place_w, logits_wv in reader.logits(fed, counted):
        label_w = torch.from_numpy(labels_T[begin_p1[sequence_w] + place_w]).to(logits_wv.device)
        loss_w = cross_entropy(logits_wv, label_w, reduction="none").double().cpu().numpy()
        # The label at `place` has place + 1 tokens before it; bucket k is for 2^k to 2^(k+1) - 1 of them.
        power_w = np.floor(np.log2(place_w + 1)).astype(np.int64)
        sums_b += np.bincount(power_w, loss_w, minlength=64)
        squares_b += np.bincount(power_w, loss_w**2, minlength=64)
        counts_b += np.bincount(power_w, minlength=64)
    tokens = int(counts_b.sum())
    loss = float(sums_b.sum() / tokens) if tokens else math.nan
    buckets = [_bucket(int(k), sums_b[k], squares_b[k], int(counts_b[k])) for k in np.flatnonzero(counts_b)]
    metadata = read_metadata(file.prefix)
    bits = None if metadata is None else metadata.bits_per_byte(loss)
    return Losses(file.prefix, length, tokens, loss, bits, buckets)


def _bucket(power: int, sum_: float, squares: float, count: int) -> Bucket:
    mean = sum_ / count
    variance = max(0.0, squares / count - mean**2)
    return Bucket(1 << power, count, mean, math.sqrt(variance / count))


def cut_documents(file: TokenFile, length: int, num_tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return pieces of `length` + 1 tokens (int64), and for each a mask of the tokens after its first that count.

    The last piece of a document may be shorter. num_tokens: number of tokens of the file to use, from its start.
    """
    tokens_T = np.memmap(file.prefix + ".bin", dtype=file.index.dtype, mode="r")
    mask_T = None if file.mask_path is None else np.memmap(file.mask_path, dtype=np.uint8, mode="r")
    pieces: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    stop = int(file.offsets_D1[0]) + num_tokens
    for begin, end in zip(file.offsets_D1[:-1].tolist(), file.offsets_D1[1:].tolist(), strict=True):
        end = min(end, stop)
        # Piece [first, last] has last - first inputs; its last token is the next piece's first input.
        for first in range(begin, end - 1, length):
            last = min(first + length, end - 1)
            pieces.append(np.array(tokens_T[first : last + 1], dtype=np.int64))
            counted.append(np.ones(last - first, bool) if mask_T is None else mask_T[first + 1 : last + 1] != 0)
    return pieces, counted
