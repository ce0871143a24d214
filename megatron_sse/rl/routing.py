"""Partitions picked while answers are generated, picked again in training (rl.replay_routing).

In bf16 generation and training round differently, and now and then a token's best partitions are others. What it has
then written into another state stays there, and all later log-probabilities differ.

M counts the layers that have partitions, R the tokens of a prompt with its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_sse.inference.layers import CachedLayout
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.model.mixer import SSEMixer
from megatron_sse.model.router import Router
from megatron_sse.parallel.layout import TokenLayout


def find_routers(net: LanguageModel) -> list[Router]:
    """Return the routers of the layers that have partitions."""
    mixers = (layer.self_attention for layer in net.decoder.layers)
    return [mixer.router for mixer in mixers if isinstance(mixer, SSEMixer) and mixer.num_partitions]


def picks_shape(routers: Sequence[Router]) -> tuple[int, int]:
    """Return M and P."""
    return len(routers), routers[0].num_picks


class Recorder:
    """The picks of sequences of at most `num_rows` tokens in a pool of places, on the device. picks_XRMP: int16."""

    def __init__(self, net: LanguageModel, num_places: int, num_rows: int) -> None:
        self.routers = find_routers(net)
        device = next(net.parameters()).device
        shape = (num_places, num_rows, *picks_shape(self.routers))
        self.picks_XRMP = torch.zeros(shape, dtype=torch.int16, device=device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is generated in a block."""
        for number, router in enumerate(self.routers):
            router.record = partial(self._record, number)
        try:
            yield
        finally:
            for router in self.routers:
                router.record = None

    def copy(self, source: int, places: Sequence[int]) -> None:
        """Copy a sequence to other places."""
        self.picks_XRMP[list(places)] = self.picks_XRMP[source].clone()

    def take(self, place: int, num_rows: int) -> np.ndarray:
        """Return the picks of the first tokens of a sequence, int16 [R, M, P]."""
        return self.picks_XRMP[place, :num_rows].cpu().numpy().copy()

    def _record(self, number: int, layout: CachedLayout, bank_TP: Tensor) -> None:
        place_T = layout.place_D[layout.document_T]
        self.picks_XRMP[place_T, layout.position_BL.flatten(), number] = bank_TP.to(torch.int16)


class Replay:
    """Picks for the routers of the model in training; set before each forward pass."""

    def __init__(self, net: LanguageModel) -> None:
        self.routers = find_routers(net)
        # Of the micro-batch whose forward and backward passes are under way; recomputation needs it, too.
        self.picks_BLMP: Tensor | None = None
        for number, router in enumerate(self.routers):
            router.replay = self._pick(number)

    def _pick(self, number: int) -> Callable[[TokenLayout], Tensor | None]:
        def pick(layout: TokenLayout) -> Tensor | None:
            return None if self.picks_BLMP is None else self.picks_BLMP[:, :, number].flatten(0, 1).long()

        return pick


def make_filler(routers: Sequence[Router]) -> np.ndarray:
    """Return picks for tokens that were not fed while generating, which no counted token comes after: int16 [M, P]."""
    return np.tile(np.arange(routers[0].num_picks) % routers[0].num_partitions, (len(routers), 1)).astype(np.int16)
