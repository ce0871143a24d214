"""Prefill, prefill in chunks and single tokens give the logits of the parallel forward pass."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.inference import layers as cache_module
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.run import feed, logits_of
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.pretrained.network import build_and_load, inference_config
from megatron_sse.pretrained.open import open_model
from tests.inference.support import SOFTMAX, make_checkpoint, model
from tests.workers import run_workers

TOLERANCE = 1e-4
LENGTHS = (17, 5, 29)
MODELS = {
    "sse gla": model(),
    "sse gla, two writers, one reader, mask": model(sse={"num_writers": 2, "num_readers": 1, "form": "mask"}),
    "sse gdn": model(sse={"recurrence": "gdn", "num_readers": 2, "negative_eigenvalues": True}),
    "sse gdn, reference gate": model(sse={"recurrence": "gdn", "gate": "reference", "num_value_heads": 4}),
    "gla": model("gla", {"value_head_dim": 12, "output_gate": False}),
    "gdn": model("gdn"),
    "sse kda": model(sse={"recurrence": "kda", "num_readers": 2, "num_value_heads": 4}),
    "kda": model("kda", {"short_convolution": 3}),
    "row-sparse": model(sse={"key_map": "topk_softmax", "key_topk": 3, "query_map": "softmax"}),
    "constant decay": model(sse={"decay": "constant"}),
    "no decay, no weights": model(sse={"decay": "none", "weight_writes": False, "weight_reads": False}),
    "hgrn2": model(sse={"key_map": "one_minus_decay", "short_convolution": 2}),
    "short convolution": model(sse={"short_convolution": 4, "num_value_heads": 4}, tie_embeddings=True),
    "short convolution, gdn": model(sse={"short_convolution": 3, "recurrence": "gdn"}),
    "sse gdn, weights on beta": model(sse={"recurrence": "gdn", "gate": "beta"}),
    "two routers": model(sse={"own_read_router": True, "num_writers": 2}),
    "no shared bank": model(sse={"shared_bank": False, "weight_scale": 4.0}),
    "softmax": model("softmax", softmax=SOFTMAX | {"qk_norm": True, "qkv_bias": True}),
    "softmax, no rotary": model("softmax", softmax=SOFTMAX | {"rotary_base": 0.0}),
    "softmax, window": model("softmax", softmax=SOFTMAX | {"window": 6}),
    "softmax, scaled rotary": model("softmax", softmax={"num_heads": 2, "rotary_scaling": {"factor": 4.0}}),
    "hybrid": model("2*sse, softmax", num_layers=3, softmax=SOFTMAX),
    "hybrid, window, convolution": model("sse, softmax", {"short_convolution": 4}, softmax=SOFTMAX | {"window": 6}),
    "all kinds": model("sse, gla, gdn, softmax", num_layers=4, softmax=SOFTMAX),
    "hybrid, input convolution": model(
        "sse, softmax", {"short_convolution": 3}, softmax=SOFTMAX | {"window": 6}, input_convolution=4
    ),
}

# Schedules by which sequences of LENGTHS are fed: for each step, pairs of place and number of tokens.
Steps = list[list[tuple[int, int]]]


def one_by_one() -> Steps:
    return [[(place, 1) for place, length in enumerate(LENGTHS) if step < length] for step in range(max(LENGTHS))]


SCHEDULES: dict[str, Steps] = {
    "whole": [list(enumerate(LENGTHS))],
    "one by one": one_by_one(),
    "chunks": [[(0, 13)], [(0, 4), (1, 5), (2, 3)], [(2, 1)], [(2, 14)], [(2, 11)]],
    "prompts of other lengths, then tokens": [[(2, 21), (1, 1), (0, 9)]]
    + [[(0, 1), (1, 1), (2, 1)]] * 4
    + [[(0, 1), (2, 1)]] * 4,
}


def run(folders: list[Path], schedules: list[Steps], mutation: Callable | None = None) -> list[list[Tensor]]:
    """Return logits [tokens, V] of each model: of a parallel pass over packed sequences, and of each schedule."""
    groups, device = init_groups(tensor=dist.get_world_size()), setup_device(0)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            mutation(patch)
        for folder in folders:
            opened = open_model("model", folder)
            net = build_and_load(opened, inference_config(opened, None, groups.tp.size()), groups, device)
            generator = torch.Generator("cpu").manual_seed(2)
            tokens_T = torch.randint(257, (sum(LENGTHS),), generator=generator, device="cpu")
            starts = np.zeros((1, len(tokens_T)), dtype=bool)
            starts[0, np.cumsum([0, *LENGTHS[:-1]])] = True
            with torch.no_grad():
                layout = TokenLayout.from_starts(starts)
                whole = net(tokens_T[None], None, None, packed_seq_params=layout, runtime_gather_output=True)[0]
            results.append([whole, *(by_steps(net, tokens_T, steps) for steps in schedules)])
    return results


def by_steps(net, tokens_T: Tensor, steps: Steps) -> Tensor:
    cache, sequences = Cache(net, len(LENGTHS)), tokens_T.split(LENGTHS)
    logits: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step in steps:
        places, counts = zip(*step, strict=True)
        new = [sequences[place][cache.lengths[place] :][:count] for place, count in step]
        fed = logits_of(net, feed(net, cache, torch.cat(new), places, counts))
        for place, part in zip(places, fed.split(counts), strict=True):
            logits[place].append(part)
    return torch.cat([part for parts in logits for part in parts])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_checkpoint(root / name, section) for name, section in MODELS.items()]


@pytest.fixture(scope="module")
def one_rank(folders: list[Path]) -> dict[str, list[Tensor]]:
    [results] = run_workers(1, run, folders, list(SCHEDULES.values()))
    return dict(zip(MODELS, results, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_like_the_parallel_forward(name: str, one_rank: dict[str, list[Tensor]]) -> None:
    whole, *by_schedule = one_rank[name]
    assert whole.std() > 0.3
    for schedule, logits in zip(SCHEDULES, by_schedule, strict=True):
        assert logits.shape == (sum(LENGTHS), 384)
        assert (logits - whole).abs().max() < TOLERANCE, schedule


def test_two_tensor_ranks(folders: list[Path], one_rank: dict[str, list[Tensor]]) -> None:
    steps = SCHEDULES["prompts of other lengths, then tokens"]
    first, second = run_workers(2, run, folders, [steps])
    for name, results, others in zip(MODELS, first, second, strict=True):
        for logits, other in zip(results, others, strict=True):
            assert (logits - one_rank[name][0]).abs().max() < TOLERANCE, name
            # Both tensor ranks pick the same tokens.
            assert torch.equal(logits, other), name


def small_masks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache_module, "_MIN_QUERIES", 4)
    patch.setattr(cache_module, "MASK_ELEMENTS", 12)


def test_blocks_of_queries(folders: list[Path]) -> None:
    """With a window, new tokens attend in blocks, here two at a time, so that masks have bounded size."""
    folder = next(folder for folder in folders if folder.name == "softmax, window")
    [[[whole, *by_schedule]]] = run_workers(1, run, [folder], list(SCHEDULES.values()), small_masks)
    for logits in by_schedule:
        assert (logits - whole).abs().max() < TOLERANCE


def forget_states(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.sse_attention
    patch.setattr(
        cache_module, "sse_attention", lambda *args, **options: original(*args, **options | {"initial_YAHKV": None})
    )


def forget_tail(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.Tail.convolve

    def wrong(self, *args):
        self.rows_XWc = torch.zeros_like(self.rows_XWc)
        return original(self, *args)

    patch.setattr(cache_module.Tail, "convolve", wrong)


def forget_position(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.CachedLayout.of.__func__

    def wrong(cls, *args):
        layout = original(cls, *args)
        layout.position_BL = TokenLayout.from_starts(layout.starts_BE).position_BL
        return layout

    patch.setattr(cache_module.CachedLayout, "of", classmethod(wrong))


def swap_places(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.CachedLayout.of.__func__

    def wrong(cls, *args):
        layout = original(cls, *args)
        if layout.num_documents == 1:
            layout.place_D = (layout.place_D + 1) % len(LENGTHS)
        return layout

    patch.setattr(cache_module.CachedLayout, "of", classmethod(wrong))


def short_ring(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.KeyValueCache.__init__
    patch.setattr(cache_module.KeyValueCache, "__init__", lambda self, key, *rest: original(self, key[:, :, 1:], *rest))


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        (forget_states, "sse gla"),
        (forget_tail, "short convolution"),
        (forget_tail, "hybrid, input convolution"),
        (forget_position, "softmax"),
        (swap_places, "sse gdn"),
        (short_ring, "softmax, window"),
    ],
)
def test_seeded_bugs_are_seen(mutation: Callable, name: str, folders: list[Path]) -> None:
    folder = next(folder for folder in folders if folder.name == name)
    [[[whole, *by_schedule]]] = run_workers(1, run, [folder], list(SCHEDULES.values()), mutation)
    assert max((logits - whole).abs().max() for logits in by_schedule) > 100 * TOLERANCE
