"""Samples cut from a token file, and the order in which a run sees them."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sse.data.checks import Index


class TokenDataset:
    """Samples of sequence_length + 1 tokens cut from the concatenated documents of a checked, memory-mapped file.

    Neighbours share one token, so that every token but the file's first is a label exactly once.
    """

    def __init__(self, prefix: str, index: Index, sequence_length: int):
        self.file = IndexedDataset(prefix)
        self.sequence_length = sequence_length
        self.num_samples = (index.num_tokens - 1) // sequence_length
        self.dtype = index.dtype
        self.first_D = index.offsets_D1[:-1]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64) and document starts (bool) of a sample, both [sequence_length + 1]."""
        begin, count = sample * self.sequence_length, self.sequence_length + 1
        tokens = self.file.bin_reader.read(self.dtype, count, begin * self.dtype.itemsize)
        starts = np.zeros(count, dtype=bool)
        low, high = np.searchsorted(self.first_D, [begin, begin + count])
        starts[self.first_D[low:high] - begin] = True
        return tokens.astype(np.int64), starts


class SampleOrder:
    """Position in the run -> sample: each epoch is a permutation of its own, a function of (seed, epoch) alone."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = -1
        self.permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, rest = divmod(position, self.num_samples)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.permutation = generator.permutation(self.num_samples)
            self.epoch = epoch
        return int(self.permutation[rest])
