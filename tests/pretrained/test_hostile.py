"""Hugging Face folders whose settings, weights and tokenizers are of the wrong kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sse.data.builder.encode import FileEncoder, find_tokenizer
from megatron_sse.errors import UserError
from megatron_sse.pretrained.open import open_model
from tests.convert.support import make_dense
from tests.data.builder.support import make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("hf") / "model", "qwen3")


# Changes to config.json, and what the error says after the file's name.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no name of a type": ({"model_type": []}, "model_type: "),
    "heads without a dim": ({"head_dim": 0}, "head_dim: "),
    "a head that is text": ({"num_attention_heads": "4"}, "num_attention_heads: got '4', allowed a number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: "),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers: "),
    "true as a number": ({"hidden_size": True}, "hidden_size: got True, allowed a number"),
    "a window of layers": ({"use_sliding_window": True, "layer_types": [[]]}, "layer_types.0: "),
    "no layers in a list": ({"use_sliding_window": True, "layer_types": []}, "layer_types: "),
    "a scaling without its factor": (
        {"rope_parameters": {"rope_type": "linear"}},
        "factor: got nothing, allowed a number",
    ),
    "a scaling that is text": ({"rope_scaling": "linear", "rope_parameters": None}, "rope_scaling: "),
    "an epsilon that is no number": ({"rms_norm_eps": float("nan")}, ""),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(model: Path, name: str) -> None:
    change, message = SETTINGS[name]
    path = model / "config.json"
    right = path.read_text()
    path.write_text(json.dumps(json.loads(right) | change))
    try:
        with pytest.raises(UserError) as caught:
            open_model("SRC", model)
    finally:
        path.write_text(right)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight_map", [{}, [], {"a": "../config.json"}, {"a": 1}, None, {"a": "x" * 5000}, {"a": "\n\x1b[2J"}, {"a": "\0"}]
)
def test_indexes(model: Path, weight_map: Any) -> None:
    path = model / "model.safetensors.index.json"
    right = path.read_text()
    path.write_text(json.dumps({"weight_map": weight_map}))
    try:
        with pytest.raises(UserError, match="weight_map|hold no tensor|not found") as caught:
            open_model("SRC", model)
        assert str(caught.value).isprintable()
    finally:
        path.write_text(right)


def test_a_tokenizer_that_knows_no_letter(tmp_path: Path) -> None:
    """What is added to any text is found with any character that the tokenizer knows; one must be."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"] = {"type": "WordLevel", "vocab": {"<end>": 0, "0": 1}, "unk_token": "<none>"}
    values |= {"pre_tokenizer": None, "decoder": None, "post_processor": None, "normalizer": None}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"^\S+tokenizer.json: "):
        FileEncoder(path, 0)


@pytest.mark.parametrize("template", [1, {}, [1], [{"name": "default", "template": 1}]])
def test_chat_templates_of_another_kind(tmp_path: Path, template: Any) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template, "eos_token": 5}))
    try:
        files = find_tokenizer(str(tmp_path))
        assert files.template is None and files.special("eos_token") is None
    except UserError as error:
        assert str(error).startswith(f"{path}: chat_template: got ")
