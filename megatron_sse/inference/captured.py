"""Decode steps as CUDA graphs: one token for each of some sequences, queued by a single launch.

A step of a small batch is hundreds of kernels that each take less time than the host needs to queue them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_sse.inference.cache import Cache
from megatron_sse.inference.layers import CachedLayout
from megatron_sse.inference.run import logits_of, run_layers
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import to_device

# Takes a function on the device, whose kernels have all been launched before. Returns the tensor that holds its result,
# and what computes it there anew; the function's operations are recorded and not executed.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Capture what `function` queues as a CUDA graph; see Capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay


class CapturedSteps:
    """A `run.Step` by CUDA graphs.

    A graph holds for one choice of places, and until the cache's tensors move: those of softmax layers that see all
    positions do so when they grow. Then one step runs as usual, which launches every kernel of its shapes once, the
    next is captured, and those after it are replayed.
    """

    def __init__(self, model: LanguageModel, cache: Cache, capture: Capture = capture_cuda_graph):
        self.model, self.cache, self.capture = model, cache, capture
        self._holds_for: tuple = ()
        # What the graph reads: written before each replay, never replaced.
        self._tokens_1D: Tensor = torch.empty(0)
        self._layout: CachedLayout | None = None
        self._logits_Dv: Tensor = torch.empty(0)
        self._replay: Callable[[], object] | None = None

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """Feed one token to each of the places; return logits [D, v], which the next call overwrites."""
        cache = self.cache
        cache.reserve(places)
        tokens_1D = to_device(np.asarray([tokens], dtype=np.int64), cache.device)
        if self._layout is None or (*places, *cache.addresses) != self._holds_for:
            # The old graph's memory is free before the new one needs some.
            self._replay, self._logits_Dv = None, torch.empty(0)
            self._holds_for = (*places, *cache.addresses)
            self._tokens_1D, self._layout = tokens_1D, cache.layout(places, [1] * len(places))
            self._layout.any_position = True
            logits_Dv = self._step()
        else:
            self._tokens_1D.copy_(tokens_1D)
            position_1D = np.asarray([[cache.lengths[place] for place in places]])
            self._layout.position_BL.copy_(to_device(position_1D, cache.device))
            if self._replay is None:
                self._logits_Dv, self._replay = self.capture(self._step)
            self._replay()
            logits_Dv = self._logits_Dv
        cache.advance(self._layout)
        return logits_Dv

    def _step(self) -> Tensor:
        assert self._layout is not None
        return logits_of(self.model, run_layers(self.model, self._tokens_1D, self._layout))
