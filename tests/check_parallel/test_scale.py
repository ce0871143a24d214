"""Settings made small allow the same layouts as the full settings; what ranks report is merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.check_parallel.documents import make_samples
from megatron_sse.check_parallel.layouts import Layout, choose_layouts, fit_layout, make_config, one_process
from megatron_sse.check_parallel.scale import scale
from megatron_sse.check_parallel.step import RankErrors
from megatron_sse.check_parallel.verdict import merge
from megatron_sse.config import RunConfig, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FULL_SIZE = str(CONFIGS / "sse_h_600m.yaml")


def fit(config: RunConfig, as_is: bool = False) -> dict[str, Layout]:
    parallels = choose_layouts(config, None)
    values, _ = scale(config, list(parallels.values()), as_is)
    given = config.model_dump()
    return {name: fit_layout(name, parallel, values, given, num_gpus=0) for name, parallel in parallels.items()}


CASES: list[list[str]] = [
    [],
    ["model.softmax.num_kv_heads=1"],
    ["model.sse.num_heads=5"],
    ["model.num_layers=18"],
    ["data.sequence_length=8190"],
    ["data.sequence_length=8188", "parallel.layout=zigzag"],
    ["model.vocab_size=32001", "model.vocab_multiple=1"],
    ["model.ffn_hidden_size=3457"],
    ["parallel.tensor=2", "parallel.context=4", "parallel.sequence=true", "model.softmax.num_kv_heads=2"],
    ["parallel.pipeline=4", "parallel.virtual_pipeline=3", "model.sse.key_map=topk_softmax", "model.sse.key_topk=32"],
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_small_model_allows_the_same_layouts(overrides: list[str]) -> None:
    config = load_config(FULL_SIZE, overrides)
    small, full = fit(config), fit(config, as_is=True)
    assert small.keys() == full.keys()
    for name, layout in small.items():
        assert (layout.config is None) == (full[name].config is None), (name, layout.reason, full[name].reason)
        # The reason names the user's sizes, not the small ones.
        assert layout.reason == full[name].reason
    assert any(layout.config is not None for layout in small.values())


def test_a_blend_is_printed_as_its_sources() -> None:
    config = load_config(FULL_SIZE, ["data.train=[{prefix: some/file}, {needle: {}, weight: 2.0}]"])
    _, lines = scale(config, list(choose_layouts(config, None).values()), False)
    assert "data.train some/file + needle -> random packed documents" in lines[-1]


def test_full_size_becomes_small_and_keeps_the_rest() -> None:
    config = load_config(FULL_SIZE, ["model.sse.num_partitions=6", "model.softmax.window=4096"])
    small = make_config(
        scale(config, list(choose_layouts(config, None).values()), False)[0], one_process(config.parallel)
    )
    model = small.model
    assert (model.num_layers, model.hidden_size, model.sse.num_heads, model.sse.head_dim) == (12, 64, 4, 16)
    # Groups of two stay, key-value heads stay indivisible by two, and the window stays half of the sequence.
    assert (model.softmax.num_heads, model.softmax.num_kv_heads, model.softmax.window) == (6, 3, 64)
    assert (small.data.sequence_length, small.training.precision) == (128, "fp32")
    assert model.sse.num_partitions == 6 and model.layer_kinds() == config.model.layer_kinds()[:12]


def test_own_layout_is_one_of_them() -> None:
    def names(*overrides: str) -> list[str]:
        return list(choose_layouts(load_config(FULL_SIZE, list(overrides)), None))

    assert "own" not in names() and "own" not in names("parallel.context=2")
    assert "own" in names("parallel.data=4") and "own" in names(
        "parallel.context=2", "parallel.hand_off=two_level", "parallel.context_per_node=2"
    )
    large = fit(load_config(FULL_SIZE, ["parallel.context=4", "parallel.data=4"]))["own"]
    assert large.reason == "needs 16 ranks, at most 8 are started"


def test_layouts_that_the_gpus_are_too_few_for() -> None:
    config = load_config(FULL_SIZE)
    given = config.model_dump()
    layout = fit_layout("cp4", choose_layouts(config, ["cp4"])["cp4"], given, given, num_gpus=2)
    assert layout.config is None and layout.reason.startswith("needs 4 ranks, found 2 GPUs")


def test_documents_of_every_sort() -> None:
    config = load_config(FULL_SIZE, ["data.sequence_length=64", "training.global_batch_size=4"])
    starts = [np.flatnonzero(sample.starts_E1) for sample in make_samples(config)]
    assert starts[0].tolist() == [0]
    assert 1 in np.diff(starts[1])
    assert len(starts[2]) > 1 and not (starts[2] % 8).any()
    assert np.diff(starts[3]).max() > 48 and len(starts[3]) > 2


def test_what_no_rank_held_is_infinitely_wrong() -> None:
    def rank(**errors: Any) -> RankErrors:
        half = torch.tensor([[True, False]])
        return RankErrors(outputs={"layer 1": 0.0}, seen={"layer 1": half}, **errors)

    layout = Layout("x", choose_layouts(load_config(FULL_SIZE), ["tp2"])["tp2"])
    other = RankErrors(outputs={"layer 1": 0.0}, seen={"layer 1": torch.tensor([[False, True]])})
    whole = merge(layout, [rank(gradients={"a": 1e-7, "b": 0.0}), other])
    assert whole.outputs == {"layer 1": 0.0} and whole.gradients == {"a": 1e-7, "b": 0.0}
    missing = merge(layout, [rank(gradients={"a": 1e-7})], whole)
    assert missing.outputs == {"layer 1": float("inf")} and missing.gradients == {"a": 1e-7, "b": float("inf")}
    assert not missing.passes({name: 1.0 for name in missing.errors()})
