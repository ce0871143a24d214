"""Upcycling of softmax models to SSE hybrids: copied tensors equal the source's, and the origin of each is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sse.errors import UserError
from megatron_sse.model import build_model
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.network import inference_groups
from megatron_sse.pretrained.open import make_run_config, open_model
from tests.convert.support import assert_same_tensors, convert, logits_by_transformers, make_dense, random_tokens


def upcycled(folder: Path, family: str, pattern: str, *overrides: str, **settings: Any) -> Path:
    source = make_dense(folder / "source", family, **settings)
    assert convert(str(source), str(folder / "ours"), pattern=pattern, overrides=overrides) == 0
    return folder / "ours"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_without_sse_layers_it_is_the_source(tmp_path: Path, family: str) -> None:
    ours = upcycled(tmp_path, family, "softmax")
    tokens_BL = random_tokens()
    logits = compute_logits(open_model("", ours), tokens_BL)
    assert (logits - logits_by_transformers(tmp_path / "source", tokens_BL)).abs().max() < 1e-4
    assert convert(str(ours), str(tmp_path / "back"), to=family) == 0
    assert_same_tensors(tmp_path / "source", tmp_path / "back")


def layer_outputs(folder: Path, number: int, hidden_LBd: torch.Tensor) -> torch.Tensor:
    """Return the output of one layer of a checkpoint for hidden states."""
    opened = open_model("", folder)
    config = make_run_config(opened.config.model.model_dump(), len(hidden_LBd), "fp32", "test")
    with inference_groups() as (groups, device), torch.no_grad():
        (chunk,) = build_model(config, groups, device)
        for name, parameter in chunk.named_parameters():
            parameter.copy_(opened.weights.get(name))
        layout = TokenLayout.from_starts(np.zeros(hidden_LBd.shape[1::-1], dtype=bool))
        return chunk.eval().decoder.layers[number](hidden_LBd, None, packed_seq_params=layout)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_softmax_layers_of_a_hybrid_are_the_sources(tmp_path: Path, family: str) -> None:
    ours = upcycled(tmp_path, family, "2*sse, softmax")
    assert convert(str(tmp_path / "source"), str(tmp_path / "plain")) == 0
    hidden_LBd = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(5))
    outputs = [layer_outputs(folder, 2, hidden_LBd) for folder in (ours, tmp_path / "plain")]
    assert torch.equal(*outputs) and outputs[0].std() > 0.1
    assert not torch.equal(layer_outputs(ours, 1, hidden_LBd), layer_outputs(tmp_path / "plain", 1, hidden_LBd))


@pytest.mark.parametrize("overrides", [(), ("model.sse.recurrence=gdn", "model.sse.num_partitions=3")], ids=str)
def test_an_sse_layer_starts_from_the_sources_projections(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    ours = upcycled(tmp_path, "qwen2", "2*sse, softmax", *overrides, tie_word_embeddings=True)
    opened, source = open_model("", ours), open_model("", tmp_path / "source")
    sse = opened.config.model.sse
    assert (sse.num_heads, sse.num_value_heads, sse.head_dim) == (4, 4, 8)
    in_proj = opened.weights.get("decoder.layers.1.self_attention.in_proj.weight").unflatten(0, (4, -1))
    q, k, v = (source.weights.get(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qkv")
    for head in range(4):
        # Query heads 0 and 1 share the first key head.
        assert torch.equal(in_proj[head, :8], q[8 * head : 8 * head + 8])
        assert torch.equal(in_proj[head, 8:16], k[8 * (head // 2) : 8 * (head // 2) + 8])
        assert torch.equal(in_proj[head, 16:24], v[8 * (head // 2) : 8 * (head // 2) + 8])
    o_proj = source.weights.get("model.layers.1.self_attn.o_proj.weight")
    assert torch.equal(opened.weights.get("decoder.layers.1.self_attention.out_proj.weight"), o_proj)
    for name in ("query_lora", "key_lora"):
        assert not opened.weights.get(f"decoder.layers.1.self_attention.{name}.up.weight").any()
        assert opened.weights.get(f"decoder.layers.1.self_attention.{name}.down.weight").std() > 0.01

    report = json.loads((ours / "conversion.json").read_text())
    sources = report["tensors"]
    assert set(sources) == set(opened.weights.keys())
    prefix = "decoder.layers.1.self_attention."
    assert sources[prefix + "in_proj.weight"][:3] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight (each head 2 times)",
        "model.layers.1.self_attn.v_proj.weight (each head 2 times)",
    ]
    assert sources[prefix + "key_lora.up.weight"] == ["zeros"]
    assert sources[prefix + "router.proj.weight"] == ["drawn (e_proj.weight)"]
    assert sources["decoder.layers.1.mlp.linear_fc2.weight"] == ["model.layers.1.mlp.down_proj.weight"]
    assert report["unused"] == [f"model.layers.{n}.self_attn.{p}_proj.bias" for n in (0, 1) for p in "qkv"]


def test_drawn_weights_are_those_of_a_new_model(tmp_path: Path) -> None:
    ours = open_model("", upcycled(tmp_path, "llama", "sse, softmax, sse"))
    with inference_groups() as (groups, device):
        (chunk,) = build_model(ours.config, groups, device)
        drawn = dict(chunk.named_parameters())
    for name in ("router.proj.weight", "output_gate.up.weight", "decay_gates.1.up.weight", "norm_weight"):
        name = f"decoder.layers.2.self_attention.{name}"
        assert torch.equal(ours.weights.get(name), drawn[name])


@pytest.mark.parametrize(
    ("pattern", "overrides", "message"),
    [
        ("2*sse", (), "command line: model.num_layers: got 3, allowed a multiple of 2"),
        ("2*mamba, softmax", (), "command line: model.layers: got 'mamba', allowed sse, gla, gdn, kda, softmax"),
        ("sse", ("model.sse.head_dim=4",), "command line: got model.sse.head_dim, allowed keys of model.sse except"),
        ("sse", ("training.steps=4",), "command line: got training.steps, allowed keys of model.sse"),
        ("sse", ("model.sse.num_partition=4",), "command line: model.sse.num_partition: got an unknown key"),
        (
            None,
            ("model.sse.num_partitions=4",),
            "command line: got model.sse.num_partitions=4, allowed only with",
        ),
    ],
)
def test_wrong_patterns(tmp_path: Path, pattern: str | None, overrides: tuple[str, ...], message: str) -> None:
    source = make_dense(tmp_path / "source", "llama")
    with pytest.raises(UserError) as error:
        convert(str(source), str(tmp_path / "ours"), pattern=pattern, overrides=overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()
