"""Histograms of half-lives, whose size does not grow with the text.

A decay of exp(g) at every write to a bank halves its state in ln 2 / -g writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Bins are equally wide in log2. A percentile is exact to half a bin, 0.6 %.
_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -20, 60
_BINS = _PER_OCTAVE * (_HIGHEST - _LOWEST)


@dataclass(frozen=True)
class Spread:
    """The 10th, 50th and 90th percentile of half-lives; infinite without decay."""

    p10: float
    p50: float
    p90: float


class HalfLives:
    """Counts of half-lives by bank. counts_Nb: int64, bank by bin (b); the last bin is for no decay."""

    def __init__(self, num_banks: int, device: torch.device):
        self.counts_Nb = torch.zeros(num_banks, _BINS + 1, dtype=torch.int64, device=device)

    def add(self, g: Tensor, bank_TP: Tensor) -> None:
        """Count the half-lives of tokens. g: log decays [T, ...]. bank_TP: the banks that each token writes to."""
        # c: channels and heads of a token; each has a half-life of its own.
        half_life = math.log(2) / g.flatten(1).double().abs()
        bin_Tc = ((half_life.log2() - _LOWEST) * _PER_OCTAVE).floor().clamp(0, _BINS - 1).long()
        bin_Tc[half_life.isinf()] = _BINS
        for bank_T in bank_TP.unbind(1):
            # One bincount for all banks: bin b of bank n is number n * (_BINS + 1) + b.
            place_Tc = bank_T[:, None] * (_BINS + 1) + bin_Tc
            self.counts_Nb += place_Tc.flatten().bincount(minlength=self.counts_Nb.numel()).view_as(self.counts_Nb)


def spread(counts_Nb: np.ndarray, writes_per_token_N: np.ndarray) -> Spread | None:
    """Return percentiles over all banks of half-lives in tokens; None without any write.

    A half-life in tokens is the one in writes divided by the writes that the bank gets per token.
    """
    # The middle of each bin, on the logarithmic scale.
    half_life_b = np.append(2.0 ** (_LOWEST + (np.arange(_BINS) + 0.5) / _PER_OCTAVE), np.inf)
    row, column = np.nonzero(counts_Nb)
    if not len(row):
        return None
    value, count = half_life_b[column] / writes_per_token_N[row], counts_Nb[row, column]
    # Weighted percentiles: sort by half-life and look up shares of the cumulative count.
    order = np.argsort(value, kind="stable")
    sums = count[order].cumsum()
    places = np.searchsorted(sums, np.array([0.1, 0.5, 0.9]) * sums[-1])
    return Spread(*value[order][places].tolist())
