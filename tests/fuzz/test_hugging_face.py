"""Hugging Face folders with settings, indexes, tokenizers and weights of any kind."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sse.data.builder.encode import FileEncoder, find_tokenizer
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import open_tokenizer
from tests.convert.support import LLAMA3, make_dense
from tests.data.builder.support import make_tokenizer
from tests.fuzz.support import Contents, broken_bytes, changed, refused_in_a_line

# Of the SSE authors' layout; the folder has no such weights, which is found after the settings.
SSE = {
    "model_type": "sse",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "linear_attn_type": "gdn",
    "attn": {
        "layers": [1],
        "num_heads": 2,
        "num_kv_heads": 1,
        "window_size": None,
        "rope_theta": 1e4,
        "qkv_bias": False,
    },
}
OURS = {
    "model_type": "megatron_sse",
    "max_position_embeddings": 16,
    "model": {"num_layers": 2, "hidden_size": 32, "vocab_size": 99, "layers": ["sse", "softmax"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_dense(tmp_path_factory.mktemp("hf") / "qwen", "qwen2", rope_parameters=LLAMA3)
    make_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def contents(folder: Path) -> Contents:
    return Contents((path.name, path.read_bytes()) for path in folder.iterdir())


def compare(folder: Path, contents: Contents, name: str, content: bytes) -> None:
    """Open the model and its tokenizer with other content of a file."""
    path = folder / name
    path.write_bytes(content)
    try:
        refused_in_a_line(lambda: open_tokenizer(open_model("SRC", folder)).encode("a text"))
        refused_in_a_line(_encode, folder)
    finally:
        path.write_bytes(contents[name])


def _encode(folder: Path) -> None:
    files = find_tokenizer(str(folder))
    name, number = files.end(None)
    assert isinstance(name, str)
    FileEncoder(files.path, number).encode(["a text"])


def _as_json(value: object) -> bytes:
    try:
        return json.dumps(value).encode()
    # Numbers of more digits than Python writes.
    except ValueError:
        return b""


@given(st.data())
def test_settings_of_any_kind(folder: Path, contents: Contents, data: st.DataObject) -> None:
    values = data.draw(st.sampled_from([json.loads(contents["config.json"]), SSE, OURS]))
    compare(folder, contents, "config.json", _as_json(data.draw(changed(values))))


@given(st.data())
def test_an_index_of_any_kind(folder: Path, contents: Contents, data: st.DataObject) -> None:
    name = "model.safetensors.index.json"
    compare(folder, contents, name, _as_json(data.draw(changed(json.loads(contents[name])))))


@given(st.data())
def test_a_tokenizer_of_any_kind(folder: Path, contents: Contents, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    compare(folder, contents, name, _as_json(data.draw(changed(json.loads(contents[name])))))


@given(st.data())
def test_files_of_any_bytes(folder: Path, contents: Contents, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(contents)))
    compare(folder, contents, name, data.draw(broken_bytes(contents[name])))


def test_the_folder_is_right(folder: Path) -> None:
    """Without a change the folder is a model, so that the tests above change what is read."""
    model = open_model("SRC", folder)
    assert all(isinstance(tensor, torch.Tensor) for _, tensor in model.tensors())
    assert open_tokenizer(model).encode("two words")
    _encode(folder)
