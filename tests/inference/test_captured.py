"""Steps that are recorded once and replayed give the logits of plain steps, and do nothing that a graph cannot hold."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megatron_sse.inference import layers
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.captured import CapturedSteps
from megatron_sse.inference.run import decode, prefill
from megatron_sse.model.language_model import LanguageModel
from tests.inference.recording import ForbiddenInGraph, record

PROMPTS = [[5, 6, 7], [9], list(range(40, 51))]
BOTH = pytest.mark.parametrize("number", [0, 1], ids=["pure", "hybrid"])


class Recorded(CapturedSteps):
    """Steps with the stand-in for CUDA graphs. captures: how many were made."""

    def __init__(self, model: LanguageModel, cache: Cache):
        super().__init__(model, cache, self._record)
        self.captures = 0

    def _record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        self.captures += 1
        layout = [getattr(self._layout, entry.name) for entry in fields(self._layout)]
        kept = [x for layer in self.cache.layers.values() for x in layer.tensors().values()]
        known = [*self.model.parameters(), *self.model.buffers(), *kept, self._tokens_1D, *layout]
        return record(function, [x for x in known if isinstance(x, Tensor)])


def compare_steps(
    net: LanguageModel, make: Callable[[LanguageModel, Cache], CapturedSteps]
) -> tuple[float, CapturedSteps]:
    """Return the largest difference of logits between plain steps and others, and the others.

    Three sequences of different lengths continue, then two of them; keys and values grow in between.
    """
    plain, cache = Cache(net, len(PROMPTS)), Cache(net, len(PROMPTS))
    for each in (plain, cache):
        prefill(net, each, PROMPTS)
    steps, worst = make(net, cache), 0.0
    for number in range(12):
        places = [0, 1, 2] if number < 8 else [0, 2]
        tokens = [(31 * number + 7 * place) % 257 for place in places]
        expected, found = decode(net, plain, tokens, places), steps(tokens, places)
        worst = max(worst, (found - expected).abs().max().item())
        assert cache.lengths == plain.lengths
    return worst, steps


@BOTH
def test_replayed_steps_are_plain_steps(
    nets: list[LanguageModel], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MIN_ROWS", 4)
    worst, steps = compare_steps(nets[number], Recorded)
    # 16 rows of keys are full after five of the first eight steps, and with the last four steps a sequence has ended.
    assert isinstance(steps, Recorded) and steps.captures == (2, 3)[number]
    # Logits are about 1. Measured 0 and 1.2e-6: a mask changes the order of sums.
    assert worst < 5e-6


def read(x: Tensor) -> None:
    float(x.sum())


def mask(x: Tensor) -> None:
    x[x > 0].sum()


def from_host(x: Tensor) -> None:
    x + torch.from_numpy(x.numpy() * 0)


def new_on_host(x: Tensor) -> None:
    torch.tensor([1.0])


def noise(x: Tensor) -> None:
    torch.dropout(x, 0.5, True)


@pytest.mark.parametrize("fault", [read, mask, from_host, new_on_host, noise])
def test_what_a_graph_cannot_hold_is_found(
    nets: list[LanguageModel], fault: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_step = layers.decode_step

    def seeded(states: Tensor, *args, **options) -> Tensor:
        fault(states)
        return decode_step(states, *args, **options)

    monkeypatch.setattr(layers, "decode_step", seeded)
    with pytest.raises(ForbiddenInGraph):
        compare_steps(nets[0], Recorded)


def test_a_number_of_rows_that_is_recorded_is_found(nets: list[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that looks at the lengths on the host is replayed with those of its first time."""
    attend = layers.KeyValueCache._attend_step

    def seeded(self: layers.KeyValueCache, q: Tensor, k: Tensor, v: Tensor, layout, scale) -> Tensor:
        layout.any_position = False
        try:
            return attend(self, q, k, v, layout, scale)
        finally:
            layout.any_position = True

    monkeypatch.setattr(layers.KeyValueCache, "_attend_step", seeded)
    worst, _ = compare_steps(nets[1], Recorded)
    assert worst > 1e-3
