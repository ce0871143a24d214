"""Softmax layers make no mask where the order of the tokens alone says what each sees: a mask shuts flash attention."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sse.inference.layers import CachedLayout, KeyValueCache
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ALL_TOKENS


class Masks(TorchDispatchMode):
    """Notes, for each call of attention, whether it takes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.seen.append((kwargs or {}).get("attn_mask") is not None)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("window", "steps", "masked"),
    [
        # Each step: (place, new tokens) of the sequences that continue.
        (None, [[(0, 5)], [(0, 4)], [(0, 3), (1, 12)], [(0, 1), (1, 1)]], False),
        (64, [[(0, 5)], [(0, 4)], [(0, 3), (1, 12)]], False),
        (4, [[(0, 9)]], True),
        (None, [[(0, 5), (1, 3)], [(0, 1), (1, 1)]], True),
    ],
)
def test_masks_of_kept_tokens(window: int | None, steps: list, masked: bool) -> None:
    layer = KeyValueCache(torch.zeros(2, 2, window or 0, 8), window, {})
    lengths = [0, 0]
    with Masks() as masks, torch.no_grad():
        for step in steps:
            places, counts = zip(*step, strict=True)
            past = [lengths[place] for place in places]
            layout = CachedLayout.of(places, past, counts, {1: layer}, "cpu", ALL_TOKENS)
            q, k, v = (torch.randn(sum(counts), heads, 8) for heads in (4, 2, 2))
            layer.attend(q, k, v, layout, None)
            for place, count in step:
                lengths[place] += count
    assert masks.seen and any(masks.seen) == masked


@pytest.mark.parametrize(("window", "masked"), [(None, False), (16, False), (15, True)])
def test_masks_of_a_forward_pass(window: int | None, masked: bool) -> None:
    starts = torch.zeros(2, 16, dtype=torch.bool).numpy()
    starts[:, 0] = True
    layout, x = TokenLayout.from_starts(starts), torch.randn(16, 2, 2, 8)
    with Masks() as masks:
        layout.attend(1, x, x, x, window=window, scale=None, dropout=0.0, group=None)
    assert masks.seen and any(masks.seen) == masked
