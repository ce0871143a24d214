"""The samples of a token file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sse.config import DataConfig
from megatron_sse.data.checks import TokenFile
from megatron_sse.data.packing import pack


@dataclass(frozen=True)
class Sample:
    """The E tokens of a sequence and one more, the label of the last.

    Attributes:
        tokens_E1: int64, 0 for padding.
        starts_E1: bool, where documents start; padding counts as a document of its own.
        counts_E1: bool, whether a token counts as a label: neither padding nor excluded by the loss mask.
        length: tokens before the padding.
        labels_E1: int64, the token to predict at each place where the labels differ from the tokens, or None; the first
            is never a label.
        of_task: whether its labels are the answers of a task.
    """

    tokens_E1: np.ndarray
    starts_E1: np.ndarray
    counts_E1: np.ndarray
    length: int
    labels_E1: np.ndarray | None = None
    of_task: bool = False


class TokenDataset:
    """The samples of a checked, memory-mapped token file, or of a part of it, packed as data.packing says."""

    def __init__(self, file: TokenFile, data: DataConfig) -> None:
        self.prefix = file.prefix
        self.tokens_T, self.mask_T = np.empty(0, file.index.dtype), None
        # An empty file cannot be mapped.
        if file.index.num_tokens:
            self.tokens_T = np.memmap(file.prefix + ".bin", file.index.dtype, mode="r")
            self.mask_T = np.memmap(file.mask_path, np.uint8, mode="r") if file.mask_path else None
        self.room = data.sequence_length + 1
        self.packing = pack(data, file.offsets_D1, file.made)

    def __len__(self) -> int:
        return self.packing.account.samples

    def __getitem__(self, number: int) -> Sample:
        tokens_E1 = np.zeros(self.room, dtype=np.int64)
        starts_E1, counts_E1 = np.zeros((2, self.room), dtype=bool)
        place = 0
        for begin, count in self.packing.pieces(number):
            chosen = slice(place, place + count)
            tokens_E1[chosen] = self.tokens_T[begin : begin + count]
            counts_E1[chosen] = True if self.mask_T is None else self.mask_T[begin : begin + count] != 0
            # An empty slice, and no error, where the place is behind the end of the sample.
            starts_E1[place : place + 1] = True
            place += count
        starts_E1[place : place + 1] = True
        return Sample(tokens_E1, starts_E1, counts_E1, place)
