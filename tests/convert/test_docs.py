"""The upcycling and scoring commands of docs/convert.md run on a small model."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sse.cli import main
from megatron_sse.config import load_config
from tests.convert.support import make_dense, random_tokens

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "convert.md").read_text()


def test_upcycling_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [upcycle] = re.findall(r"^ +megatron-sse (convert (?!SRC).*)$", PAGE, re.MULTILINE)
    [score] = re.findall(r"^ +\.venv/bin/megatron-sse (score .*)$", PAGE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    make_dense(tmp_path / "Qwen2.5-1.5B", "qwen2", num_hidden_layers=6)
    assert main(shlex.split(upcycle)) == 0
    model = load_config(tmp_path / "start" / "config.yaml").model
    assert model.layer_kinds() == [*["sse"] * 5, "softmax"] and model.sse.num_partitions == 8
    tokens_BL = random_tokens()
    save_file({"input_ids": tokens_BL}, tmp_path / "X.safetensors")
    assert main(shlex.split(score.replace("DIR", "start"))) == 0
    logits = load_file(tmp_path / "Y.safetensors")["logits"]
    assert logits.shape[:2] == tokens_BL.shape and logits.dtype == torch.float32 and logits.std() > 0.01
