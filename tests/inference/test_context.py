"""Prompts split over context ranks give the logits and caches of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.inference import layers as cache_module
from megatron_sse.inference.cache import Cache
from megatron_sse.inference.run import feed, logits_of, prefill
from megatron_sse.parallel import prefill as prefill_module
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.pretrained.network import build_and_load, inference_config
from megatron_sse.pretrained.open import open_model
from tests.inference.support import make_checkpoint
from tests.inference.test_parity import MODELS, TOLERANCE
from tests.workers import run_workers

# The first turn has parts shorter than a convolution or window looks back, parts of one token, and too few tokens to
# split. In the second turn, the kept states enter the first part.
PROMPTS = ((33, 5, 2), (9, 1, 30))
CHUNK = 7


def run(folders: list[Path], tensor: int, mutation: Callable | None = None) -> list[list[Tensor]]:
    """Return, for each model, logits after each turn's prompts and after one more token, and the final caches."""
    groups, device = init_groups(tensor, context=dist.get_world_size() // tensor), setup_device(0)
    shard = ContextShard(groups.cp.rank(), groups.cp.size())
    generator = torch.Generator("cpu").manual_seed(2)
    turns = [[torch.randint(257, (n,), generator=generator).tolist() for n in lengths] for lengths in PROMPTS]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            mutation(patch)
        for folder in folders:
            opened = open_model("model", folder)
            net = build_and_load(opened, inference_config(opened, None, tensor), groups, device)
            cache = Cache(net, 3)
            results.append([prefill(net, cache, turn, CHUNK, shard) for turn in turns])
            results[-1].append(logits_of(net, feed(net, cache, torch.tensor([3, 4, 5]), range(3), [1] * 3)))
            assert cache.lengths == [sum(lengths) + 1 for lengths in zip(*PROMPTS, strict=True)]
            if tensor == 1:
                kept = [layer.tensors() for layer in cache.layers.values()]
                results[-1] += [tensors[name] for tensors in kept for name in sorted(tensors)]
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_checkpoint(root / name, section) for name, section in MODELS.items()]


@pytest.fixture(scope="module")
def one_process(folders: list[Path]) -> list[list[Tensor]]:
    [results] = run_workers(1, run, folders, 1)
    return results


@pytest.mark.parametrize(("size", "tensor"), [(2, 1), (4, 1), (4, 2)])
def test_context_ranks(size: int, tensor: int, folders: list[Path], one_process: list[list[Tensor]]) -> None:
    for results in run_workers(size, run, folders, tensor):
        for name, tensors, expected in zip(MODELS, results, one_process, strict=True):
            assert len(tensors) == (3 if tensor > 1 else len(expected))
            for found, wanted in zip(tensors, expected, strict=False):
                assert (found - wanted).abs().max() < TOLERANCE, name


def forget_kept_states(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.edges_behind
    patch.setattr(cache_module, "edges_behind", lambda initial, *rest: original(0 * initial, *rest))


def keep_own_states(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache_module, "of_last_rank", lambda x, group: x)


def forget_transition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefill_module, "apply_transition", lambda transition, state: state)


def forget_kept_tail(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.tails
    patch.setattr(cache_module, "tails", lambda x, kept, group: original(x, 0 * kept, group))


def keep_own_tail(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.tails
    patch.setattr(
        cache_module, "tails", lambda x, kept, group: (original(x, kept, group)[0], torch.cat((kept, x))[-len(kept) :])
    )


def same_positions(patch: pytest.MonkeyPatch) -> None:
    original = cache_module.CachedLayout.of.__func__

    def wrong(cls, *args):
        layout = original(cls, *args)
        layout.position_BL = layout.position_BL - layout.shard.rank * layout.length
        return layout

    patch.setattr(cache_module.CachedLayout, "of", classmethod(wrong))


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        (forget_kept_states, "sse gla"),
        (keep_own_states, "sse gdn"),
        (forget_transition, "sse gdn"),
        (forget_kept_tail, "short convolution"),
        (keep_own_tail, "hybrid, input convolution"),
        (same_positions, "softmax"),
    ],
)
def test_seeded_bugs_are_seen(
    mutation: Callable, name: str, folders: list[Path], one_process: list[list[Tensor]]
) -> None:
    number = list(MODELS).index(name)
    found = [results[0] for results in run_workers(2, run, [folders[number]], 1, mutation)]
    expected = one_process[number]
    differences = [(a - b).abs().max() for results in found for a, b in zip(results, expected, strict=True)]
    assert max(differences) > 100 * TOLERANCE
