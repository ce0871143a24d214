"""Which softmax layers are missed most: the losses are those of folders that convert makes."""

from pathlib import Path

import pytest
import torch

from megatron_sse.data.checks import check_token_file
from megatron_sse.evaluation.perplexity import measure_losses
from megatron_sse.evaluation.read import Reader
from megatron_sse.pretrained.network import build_and_load, inference_config, inference_groups
from megatron_sse.pretrained.open import open_model
from megatron_sse.tools.layer_sensitivity import keep_most, main
from tests.convert.support import SIZES, convert, make_dense
from tests.data.files import random_documents, write_tokens


def loss_of(folder: Path, prefix: str, length: int) -> float:
    model = open_model("SRC", folder)
    with inference_groups(1) as (groups, device), torch.no_grad():
        config = inference_config(model, None)
        reader = Reader(build_and_load(model, config, groups, device), config.model.vocab_size, 8, 8192)
        return measure_losses(reader, check_token_file("--data", prefix, SIZES["vocab_size"]), length, 1 << 16).loss


def test_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = make_dense(tmp_path / "llama", "llama"), str(tmp_path / "tokens")
    write_tokens(data, random_documents(4, 40))
    num_layers = open_model("SRC", source).config.model.num_layers
    arguments = [str(source), "--data", data, "--length", "32", "model.sse.num_partitions=2"]
    assert main([*arguments, "--keep", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in said if line.startswith("| ")][1:]
    losses = []
    for number in range(num_layers):
        pattern = ", ".join("sse" if place == number else "softmax" for place in range(num_layers))
        made = tmp_path / f"made{number}"
        convert(str(source), str(made), pattern=pattern, overrides=("model.sse.num_partitions=2",))
        losses.append(loss_of(made, data, 32))
    whole = loss_of(source, data, 32)
    assert f"{whole:.4f} nats" in said[0]
    assert rows == [[str(n), f"{loss:.4f}", f"{loss - whole:.4f}"] for n, loss in enumerate(losses, 1)]
    assert len(set(losses)) == num_layers
    assert said[-1] == f'--pattern "{keep_most(losses, 1)}"'


def test_keep_most() -> None:
    assert keep_most([2.0, 3.0, 1.0, 3.0], 1) == "sse, softmax, sse, sse"
    assert keep_most([2.0, 3.0, 1.0, 3.0], 3) == "softmax, softmax, sse, softmax"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--keep", "0"], "--keep: got 0, allowed 1 to 3"),
        (["--keep", "1", "model.hidden_size=8"], "got model.hidden_size, allowed keys of model.sse"),
        (["--keep", "1", "--data", "nowhere"], "--data: nowhere.idx"),
    ],
)
def test_errors(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = make_dense(tmp_path / "llama", "llama"), str(tmp_path / "tokens")
    write_tokens(data, random_documents(4, 40))
    capsys.readouterr()
    assert main([str(source), "--data", data, *arguments]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
