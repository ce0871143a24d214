"""Checkpoints of ours are read by their own names, whatever Hugging Face layouts have names for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sse.checkpoint.full_weights import read_weights, write_weights
from megatron_sse.cli import main
from megatron_sse.convert import command as convert_command
from megatron_sse.pretrained import open as open_module
from megatron_sse.pretrained.open import open_model
from tests.inference.support import make_checkpoint, model


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose layers have no names in any Hugging Face layout."""
    folder = make_checkpoint(tmp_path / "model", model())

    def model_links(*_: object) -> None:
        raise AssertionError("asked for names in a Hugging Face folder")

    monkeypatch.setattr(open_module, "model_links", model_links)
    monkeypatch.setattr(convert_command, "model_links", model_links)
    return folder


def test_commands_need_no_other_names(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "--prompt", "a", "--max-tokens", "3"]) == 0
    output = ["--output", str(tmp_path / "out")]
    assert main(["evaluate", str(checkpoint), "mqar", "--samples", "2", "--lengths", "96", *output]) == 0
    assert main(["inspect-states", str(checkpoint), "--prompt", "abc", *output]) == 0
    assert json.loads((tmp_path / "out/states.json").read_text())["layers"]
    save_file({"input_ids": torch.tensor([[1, 2, 3]])}, tmp_path / "tokens.safetensors")
    files = ["--input", str(tmp_path / "tokens.safetensors"), "--output", str(tmp_path / "logits.safetensors")]
    assert main(["score", "--checkpoint", str(checkpoint), *files]) == 0
    assert load_file(tmp_path / "logits.safetensors")["logits"].shape == (1, 3, 257)


def test_tensors_of_another_model(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = checkpoint.with_name("other")
    weights, config = read_weights(checkpoint), open_model("", checkpoint).config
    tensors = {name: weights.get(name) for name in weights.keys()}
    tensors["decoder.final_layernorm.weight"] = torch.zeros(31)
    tensors["extra"] = tensors.pop("decoder.layers.1.mlp.linear_fc2.weight")
    other.mkdir()
    write_weights(other, config, tensors.items())
    assert main(["generate", str(other), "--prompt", "a"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"{other}: got tensors that are not those of the model in its settings: ")
    assert "decoder.final_layernorm.weight (31 found, 32 expected)" in errors and "extra (" in errors
    assert errors.count("\n") == 1
