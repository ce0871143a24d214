"""Conversion of Llama, Qwen2, Qwen3 and Mistral to our softmax layers and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.errors import UserError
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model
from tests.convert.support import (
    LLAMA3,
    SIZES,
    assert_same_tensors,
    convert,
    logits_by_transformers,
    make_dense,
    random_tokens,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("mistral", {"sliding_window": 24, "num_key_value_heads": 1}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 12}),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_ways(tmp_path: Path, name: str) -> None:
    family, settings = MODELS[name]
    source = make_dense(tmp_path / "source", family, **settings)
    assert convert(str(source), str(tmp_path / "ours")) == 0
    assert convert(str(tmp_path / "ours"), str(tmp_path / "back"), to=family) == 0
    assert_same_tensors(source, tmp_path / "back")
    tokens_BL = random_tokens()
    expected = logits_by_transformers(source, tokens_BL)
    assert expected.std() > 0.5
    for logits in (
        compute_logits(open_model("", tmp_path / "ours"), tokens_BL),
        logits_by_transformers(tmp_path / "back", tokens_BL),
    ):
        assert (logits - expected).abs().max() < 1e-4
    report = json.loads((tmp_path / "ours/conversion.json").read_text())
    prefix = "model.layers.1.self_attn."
    assert report["tensors"]["decoder.layers.1.self_attention.linear_qkv.weight"] == [
        f"{prefix}{part}_proj.weight" for part in "qkv"
    ]


def test_a_model_in_half_precision_keeps_its_bits(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "source", "qwen2", dtype="bfloat16")
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "half")
    assert convert(str(tmp_path / "half"), str(tmp_path / "ours")) == 0
    assert open_model("", tmp_path / "ours").config.training.precision == "bf16"
    assert convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="qwen2") == 0
    assert_same_tensors(tmp_path / "half", tmp_path / "back")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bias of the output": ("llama", {"attention_bias": True}, "attention_bias: got True, allowed False"),
    "bias of the mlp": ("llama", {"mlp_bias": True}, "mlp_bias: got True"),
    "activation": ("mistral", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', allowed 'silu'"),
    "yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
             "original_max_position_embeddings": 64}}, "rope_type: got 'yarn', allowed 'default', 'linear', 'llama3'"),
    "windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
        "layer_types: got a window in some layers, allowed in all or none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_layers_lack_is_refused_by_name(tmp_path: Path, name: str) -> None:
    family, settings, message = REFUSED[name]
    source = make_dense(tmp_path / "source", family, **settings)
    with pytest.raises(UserError) as error:
        convert(str(source), str(tmp_path / "ours"))
    assert str(error.value).startswith(f"{source}/config.json: {message}") and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_unknown_families_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="config.json: model_type: got 'gpt2', allowed megatron_sse, sse, llama, qwen2"):
        convert(str(tmp_path), str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("source", "settings", "to", "message"),
    [
        ("qwen2", {}, "llama", "model.softmax.qkv_bias: got True, allowed in a llama model: false; use --to hf"),
        ("qwen3", {}, "mistral", "model.softmax.qk_norm: got True"),
        ("mistral", {}, "llama", "model.softmax.window: got 4096, allowed in a llama model: null"),
        ("llama", {}, "qwen3", "model.softmax.qk_norm: got False, allowed in a qwen3 model: true"),
        ("llama", {}, "sse", "model.layers: got softmax, allowed in the layout of the SSE authors' code: sse, softmax"),
        ("llama", {}, "ours", "--to: got ours, allowed hf, sse, llama"),
    ],
)
def test_a_family_gets_only_what_it_has(
    tmp_path: Path, source: str, settings: dict[str, Any], to: str, message: str
) -> None:
    make_dense(tmp_path / "source", source, **settings)
    assert convert(str(tmp_path / "source"), str(tmp_path / "ours")) == 0
    with pytest.raises(UserError) as error:
        convert(str(tmp_path / "ours"), str(tmp_path / "other"), to=to)
    assert str(error.value).startswith(message)


def test_settings_of_older_transformers(tmp_path: Path) -> None:
    """Settings before version 5 of transformers, with rope_theta and rope_scaling at the top level, are read."""
    source = make_dense(tmp_path / "source", "llama", rope_parameters=LLAMA3)
    values = json.loads((source / "config.json").read_text())
    rope = values.pop("rope_parameters")
    (source / "config.json").write_text(
        json.dumps(values | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope})
    )
    softmax = open_model("", source).config.model.softmax
    assert softmax.rotary_base == 500.0
    assert softmax.rotary_scaling is not None and softmax.rotary_scaling.original_length == 32
    assert softmax.num_kv_heads == SIZES["num_key_value_heads"]
