"""Measures against the oracle, and on models with known numbers."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sse.errors import UserError
from megatron_sse.inspection.measure import Layer, LayerSums, Rank, measure_layers, pieces, rank_marks
from megatron_sse.inspection.pictures import draw_all
from megatron_sse.inspection.report import tabulate
from megatron_sse.parallel.device import setup_device
from megatron_sse.parallel.groups import init_groups
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from tests.inference.support import SOFTMAX, make_checkpoint, model
from tests.inspection.support import Handed, half_lives, look_at, percentiles, ranks
from tests.workers import run_workers

TEXTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (70, 37)]
MODELS = {
    "gla": model(sse={"num_partitions": 3}),
    "gdn": model(sse={"recurrence": "gdn", "num_writers": 2, "num_readers": 1, "num_value_heads": 4}),
    "row-sparse": model(sse={"key_map": "topk_softmax", "key_topk": 3, "short_convolution": 3}),
    "no partitions": model(sse={"num_partitions": 0}),
    "kda": model(sse={"recurrence": "kda", "num_readers": 2, "num_value_heads": 4}),
    "all kinds": model("gdn, softmax, sse, gla", num_layers=4, softmax=SOFTMAX, sse={"value_head_dim": 12}),
}
# Half a bin of the histogram is 0.54 %.
WIDTH = 0.006


def measure(folder: Path, texts: list[list[int]], chunk: int, change: Any = None) -> list[Layer]:
    opened = open_model("", folder)
    with inference_groups(1) as (groups, device):
        net = build_and_load(opened, inference_config(opened, None), groups, device)
        if change is not None:
            change(net)
        return measure_layers(net, opened.config.model.layer_kinds(), texts, chunk, groups.tp)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(root / name, section) for name, section in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_like_the_oracle(name: str, folders: dict[str, Path]) -> None:
    layers = measure(folders[name], TEXTS, 2048)
    kinds = [layer.kind for layer in layers]
    assert kinds == (["gdn", "softmax", "sse", "gla"] if name == "all kinds" else ["sse", "sse"])
    seen = iter(look_at(folders[name], TEXTS))
    for layer in layers:
        if layer.kind == "softmax":
            assert layer == Layer(layer.layer, "softmax")
            continue
        assert layer.most == 8 and layer.end is not None
        handed = next(seen)
        expected = [ranks(text) for text in handed]
        check_rank(layer.end, expected, round((70 + 37) / 2))
        assert [rank.tokens for rank in layer.growth] == [16, 64, 70]
        check_rank(layer.growth[0], [ranks(text.first(16)) for text in handed], 16)
        check_rank(layer.growth[1], [ranks(handed[0].first(64))], 64)
        check_rank(layer.growth[2], expected[:1], 70)
        check_use(layer, handed)
        check_half_lives(layer, handed)


def check_rank(rank: Rank, expected: list[np.ndarray], tokens: int) -> None:
    assert (rank.tokens, rank.texts) == (tokens, len(expected))
    assert [rank.shared, *rank.partition_N] == pytest.approx(np.mean(expected, 0).tolist(), rel=1e-3)


def check_use(layer: Layer, handed: list[Handed]) -> None:
    if handed[0].routes is None:
        assert layer.use is None
        return
    assert layer.use is not None
    for what in ("writer", "reader"):
        count_N = np.zeros(3)
        for text in handed:
            for picks in text.routes.bank_TP.tolist():
                for bank in picks[: getattr(text.routes, f"num_{what}s")]:
                    count_N[bank] += 1
        share_N = count_N / count_N.sum()
        assert getattr(layer.use, {"writer": "write", "reader": "read"}[what] + "_share_N") == pytest.approx(share_N)
        in_effect = math.exp(-sum(share * math.log(share) for share in share_N if share))
        assert {"writer": layer.use.written, "reader": layer.use.read}[what] == pytest.approx(in_effect)
    top = [max(probs) for text in handed for probs in text.routes.prob_TN.tolist()]
    assert layer.use.top_probability == pytest.approx(np.mean(top))


def check_half_lives(layer: Layer, handed: list[Handed]) -> None:
    found = asdict(layer)["half_life"]
    shared = [value for text in handed for value in half_lives(text.shared.g)]
    assert found["shared"] == pytest.approx(percentiles(shared), rel=WIDTH)
    if handed[0].routes is None:
        assert found["sparse_writes"] is None and found["sparse_tokens"] is None
        assert found["partition_writes_N"] == found["partition_tokens_N"] == []
        return
    writes: list[list[float]] = [[], [], []]
    for text in handed:
        for token, picks in enumerate(text.routes.bank_TP.tolist()):
            for bank in picks[: text.routes.num_writers]:
                writes[bank] += half_lives(text.sparse.g[token])
    size = text.sparse.g[0].numel()
    tokens = [[value / (len(bank) / size / 107) for value in bank] for bank in writes]
    for name, values in (("writes", writes), ("tokens", tokens)):
        assert found[f"sparse_{name}"] == pytest.approx(percentiles(sum(values, [])), rel=WIDTH)
        for bank, spread in zip(values, found[f"partition_{name}_N"], strict=True):
            assert spread == (pytest.approx(percentiles(bank), rel=WIDTH) if bank else None)


def close(value: Any) -> Any:
    """Return a layer's numbers as approximate values: nearly equal decays may fall into neighbouring bins."""
    if isinstance(value, dict):
        return {key: close(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [close(entry) for entry in value]
    return pytest.approx(value, rel=2 * WIDTH) if isinstance(value, float) else value


def numbers(layers: list[Layer]) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in layers]


def test_chunks_change_nothing(folders: dict[str, Path]) -> None:
    texts = [TEXTS[1], TEXTS[0][:20]]
    whole = numbers(measure(folders["all kinds"], texts, 2048))
    for chunk in (1, 13):
        assert numbers(measure(folders["all kinds"], texts, chunk)) == close(whole)


def on_two_ranks(folder: Path) -> list[Layer]:
    groups, device = init_groups(tensor=dist.get_world_size()), setup_device(0)
    opened = open_model("", folder)
    net = build_and_load(opened, inference_config(opened, None, 2), groups, device)
    return measure_layers(net, opened.config.model.layer_kinds(), TEXTS, 2048, groups.tp)


def test_two_tensor_ranks(folders: dict[str, Path]) -> None:
    """Two tensor ranks with half of the heads each report the same measures of all heads."""
    first, second = run_workers(2, on_two_ranks, folders["all kinds"])
    assert first == second
    assert numbers(first) == close(numbers(measure(folders["all kinds"], TEXTS, 2048)))


def test_constant_decay(tmp_path: Path) -> None:
    """Known half-lives: heads decay by 1 - 1/32 and 1 - 1/64, and a zero router picks the first partition."""
    folder = make_checkpoint(tmp_path / "model", model(sse={"decay": "constant"}))

    @torch.no_grad()
    def level(net: Any) -> None:
        for layer in net.decoder.layers:
            layer.self_attention.router.proj.weight.zero_()

    for layer in measure(folder, TEXTS, 2048, level):
        known = [math.log(0.5) / math.log(1 - 2.0**-power) for power in (5, 6)]
        spread = {"p10": known[0], "p50": known[0], "p90": known[1]}
        assert layer.use is not None and layer.end is not None
        assert layer.use.write_share_N == layer.use.read_share_N == [1, 0, 0]
        assert (layer.use.written, layer.use.read) == (1, 1)
        assert layer.use.top_probability == pytest.approx(1 / 3)
        assert layer.end.partition_N[0] > 1 and layer.end.partition_N[1:] == [0, 0]
        found = asdict(layer)["half_life"]
        for name in ("shared", "sparse_writes", "sparse_tokens"):
            assert found[name] == pytest.approx(spread, rel=WIDTH)
        assert found["partition_tokens_N"] == [pytest.approx(spread, rel=WIDTH), None, None]


def test_without_shared_bank(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model("sse, gla", {"shared_bank": False}))
    sparse, plain = measure(folder, TEXTS, 2048)
    assert sparse.end is not None and plain.end is not None and sparse.half_life is not None
    assert sparse.end.shared is None and sparse.half_life.shared is None and plain.end.shared is not None
    assert len(sparse.end.partition_N) == 3 and sparse.half_life.sparse_tokens is not None
    row = tabulate([sparse, plain]).split("at the end")[1].splitlines()[2].split()
    assert row == ["1", "sse", "-", *(f"{rank:.2f}" for rank in sparse.end.partition_N)]
    draw_all(tmp_path, [sparse])


@pytest.mark.parametrize(("layer", "part"), [(0, "decay_gates.0.down"), (1, "in_proj")])
def test_not_finite(layer: int, part: str, folders: dict[str, Path]) -> None:
    """Decays that are not finite are reported, and so are states with finite decays."""

    @torch.no_grad()
    def diverge(net: Any) -> None:
        net.decoder.layers[layer].self_attention.get_submodule(part).weight.fill_(math.nan)

    with pytest.raises(UserError, match="CHECKPOINT: the model has diverged: its decays or states are not finite"):
        measure(folders["gla"], [[1, 2, 3]], 2048, diverge)


def test_marks_and_pieces() -> None:
    assert rank_marks(5) == [5] and rank_marks(16) == [16] and rank_marks(100) == [16, 64, 100]
    assert list(pieces(40, [16, 64, 100], 10)) == [(0, 10), (10, 16), (16, 26), (26, 36), (36, 40)]
    assert list(pieces(64, [16, 64], 2048)) == [(0, 16), (16, 64)]


def test_memory_does_not_grow(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measures keep as much for 6,000 tokens as for 60, except ranks at 6 marks in place of 2."""
    sizes = []
    original = LayerSums.layer

    def layer(self, *args):
        tensors = [self.shared.counts_Nb, self.sparse.counts_Nb, self.writes_N, self.reads_N, self.top]
        tensors += [rank_A for ranks_of in self.marks.values() for rank_A in ranks_of]
        sizes.append(sum(tensor.numel() for tensor in tensors))
        return original(self, *args)

    monkeypatch.setattr(LayerSums, "layer", layer)
    for length in (60, 6000):
        measure(folders["gla"], [torch.arange(length).remainder(256).tolist()], 512)
    assert sizes[2] - sizes[0] == 4 * 4
