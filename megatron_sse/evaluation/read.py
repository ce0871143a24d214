"""Logits at chosen tokens of sequences, computed in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sse.inference.cache import Cache
from megatron_sse.inference.run import cut, feed, logits_of
from megatron_sse.model.language_model import LanguageModel


@dataclass(frozen=True)
class Reader:
    """A model that reads `batch` sequences at a time, in chunks of at most `chunk` tokens."""

    net: LanguageModel
    vocab_size: int
    batch: int
    chunk: int

    def logits(
        self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
        """Yield, for the w wanted tokens of each chunk: sequence [w], position in it [w], fp32 logits [w, vocab_size].

        Args:
            sequences: tokens, int64, at least one in each.
            wanted: bool masks of the sequences, of the same lengths.
        """
        for first in range(0, len(sequences), self.batch):
            group = sequences[first : first + self.batch]
            cache = Cache(self.net, len(group))
            for pieces in cut([len(tokens) for tokens in group], self.chunk):
                places, begins, counts = (np.array(column) for column in zip(*pieces, strict=True))
                chosen = [(place, slice(begin, begin + count)) for place, begin, count in pieces]
                tokens_T = torch.from_numpy(np.concatenate([group[place][part] for place, part in chosen]))
                # T counts the tokens of this chunk, sequence after sequence; w those of them that are wanted.
                wanted_T = np.concatenate([wanted[first + place][part] for place, part in chosen])
                hidden_T1d = feed(self.net, cache, tokens_T, places.tolist(), counts.tolist())
                # The chunk still had to be read: it changes the cache.
                if not wanted_T.any():
                    continue
                sequence_T = first + np.repeat(places, counts)
                position_T = np.concatenate([np.arange(part.start, part.stop) for _, part in chosen])
                row_w = torch.from_numpy(np.flatnonzero(wanted_T)).to(hidden_T1d.device)
                logits_wv = logits_of(self.net, hidden_T1d[row_w])[:, : self.vocab_size]
                yield sequence_T[wanted_T], position_T[wanted_T], logits_wv
