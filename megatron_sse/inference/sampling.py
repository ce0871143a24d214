"""Which token comes next: drawn for a batch of sequences on the device, the same at any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sse.parallel.device import to_device

# Of splitmix64 (Steele, Lea, Flood 2014), as signed numbers of 64 bits.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class KeyedSampler:
    """Draws tokens by their logits, with random numbers that follow from the key of each sequence.

    vocab_size: tokens that may be drawn; what pads the vocabulary may not. temperature: logits are divided by it; 0
    takes the likeliest token. top_p: tokens are drawn among the fewest likeliest that have this share of the
    probability; log-probabilities are those among all.
    """

    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0

    def draw(self, logits_Dv: Tensor, key_D: Tensor, count_D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens, int64 [D], and their log-probabilities, fp32 (fp64 for such logits) [D].

        key_D: int64, of each sequence (make_key). count_D: int64, the tokens that have been drawn for it.
        """
        logits_Dv = logits_Dv[:, : self.vocab_size]
        if self.temperature == 0:
            logp_Dv = logits_Dv.log_softmax(-1)
            token_D = logp_Dv.argmax(-1)
        else:
            logp_Dv = (logits_Dv / self.temperature).log_softmax(-1)
            token_D = self._pick(logp_Dv.double().exp(), uniform(key_D, count_D))
        return token_D, logp_Dv.gather(-1, token_D[:, None])[:, 0]

    def _pick(self, prob_Dv: Tensor, uniform_D: Tensor) -> Tensor:
        """Return the tokens in whose part of the summed probabilities the numbers lie."""
        order_Dv = None
        if self.top_p < 1:
            prob_Dv, order_Dv = prob_Dv.sort(dim=-1, descending=True, stable=True)
            # Kept are the tokens whose predecessors sum to less than top_p.
            prob_Dv = prob_Dv.masked_fill(prob_Dv.cumsum(-1) - prob_Dv >= self.top_p, 0)
        sum_Dv = prob_Dv.cumsum(-1)
        all_D1 = sum_Dv[:, -1:]
        # Below the whole sum, where rounding may lead: the first larger sum is then that of a token with a probability.
        drawn_D1 = torch.minimum(uniform_D[:, None] * all_D1, torch.nextafter(all_D1, torch.zeros_like(all_D1)))
        rank_D1 = torch.searchsorted(sum_Dv, drawn_D1, right=True)
        # Sums that are not finite lead anywhere.
        rank_D1 = rank_D1.clamp(max=sum_Dv.shape[1] - 1)
        return (rank_D1 if order_Dv is None else order_Dv.gather(-1, rank_D1))[:, 0]


class Sampler:
    """Picks the next tokens of sequences in a cache.

    Every sequence has random numbers of its own: what it becomes does not depend on the others of its batch, and is
    the same on all tensor ranks.

    Args:
        vocab_size, temperature, top_p: as of a KeyedSampler.
        seed: of the random numbers, 0 or more.
    """

    def __init__(self, vocab_size: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        self.keyed, self.seed = KeyedSampler(vocab_size, temperature, top_p), seed
        self._drawn: Counter[int] = Counter()

    def pick(self, logits_Dv: Tensor, places: Sequence[int]) -> list[int]:
        """Return the next token of each of the sequences in `places`."""
        keys = np.array([make_key(self.seed, place) for place in places], dtype=np.int64)
        counts = np.array([self._drawn[place] for place in places])
        self._drawn.update(places)
        on_device = (to_device(x, logits_Dv.device) for x in (keys, counts))
        return self.keyed.draw(logits_Dv, *on_device)[0].tolist()


def make_key(*numbers: int) -> int:
    """Return a number of 64 bits that the random numbers of a sequence depend on, and on nothing else."""
    [word] = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(word.view(np.int64))


def uniform(key_D: Tensor, count_D: Tensor) -> Tensor:
    """Return random numbers in [0, 1), fp64 [D]: that of place `count` in the sequence of each key."""
    # Products of int64 wrap around, as those of splitmix64's unsigned numbers do.
    x_D = key_D + (count_D + 1) * _STEP
    for shift, factor in _MIX:
        x_D = (x_D ^ _shift_right(x_D, shift)) * factor
    x_D = x_D ^ _shift_right(x_D, 31)
    return _shift_right(x_D, 11).double() * 2.0**-53


def _shift_right(x_D: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left, as for unsigned numbers."""
    return (x_D >> bits) & ((1 << (64 - bits)) - 1)
