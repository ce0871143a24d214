"""A cache that shows watchers what SSE layers pass to their banks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from megatron_sse.inference.cache import Cache
from megatron_sse.inference.layers import BankCache, CachedLayout
from megatron_sse.kernels import BankInputs, BankOutputs, Routes
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.sharding import ALL_TOKENS, ContextShard


class Watcher(Protocol):
    """An observer of one layer's banks."""

    def see(self, shared: BankInputs, sparse: BankInputs | None, routes: Routes | None) -> None:
        """Observe the inputs of a layer's banks for some tokens."""
        ...


class WatchedCache(Cache):
    """A cache that shows `watchers`, by layer number, what SSE layers pass to it."""

    def __init__(self, model: LanguageModel, num_sequences: int, watchers: Mapping[int, Watcher]):
        super().__init__(model, num_sequences)
        self.watched = dict(self.layers) | {
            number: _WatchedBanks(self.banks(number), watcher) for number, watcher in watchers.items()
        }

    def banks(self, number: int) -> BankCache:
        """Return the cache of an SSE layer's banks."""
        kept = self.layers[number]
        assert isinstance(kept, BankCache)
        return kept

    def layout(self, places: Sequence[int], counts: Sequence[int], shard: ContextShard = ALL_TOKENS) -> CachedLayout:
        return replace(super().layout(places, counts, shard), layers=self.watched)


class _WatchedBanks:
    """A stand-in for a layer's cache that shows its inputs to a watcher first."""

    def __init__(self, kept: BankCache, watcher: Watcher):
        self._kept, self._watcher = kept, watcher

    def attend(
        self,
        shared: BankInputs,
        sparse: BankInputs | None,
        v_THV: Tensor,
        routes: Routes | None,
        layout: CachedLayout,
        **options: Any,
    ) -> BankOutputs:
        self._watcher.see(shared, sparse, routes)
        return self._kept.attend(shared, sparse, v_THV, routes, layout, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)
