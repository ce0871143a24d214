"""A run with KDA layers from training to export: the newest recurrence goes everywhere that the others go."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sse.cli import main
from tests.checkpoint.support import Trace, train_and_save
from tests.training.support import small_run
from tests.workers import run_workers

MODEL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "vocab_size": 257,
    "layers": "sse, kda, softmax",
    "sse": {"recurrence": "kda", "num_heads": 2, "head_dim": 8, "num_value_heads": 4, "num_readers": 2},
    "softmax": {"num_heads": 2},
}


def train(folder: Path, context: int, resume: Path | None, last_step: int) -> Trace:
    sections = {"model": MODEL, "parallel": {"context": context}, "data": {"sequence_length": 32}}
    return train_and_save(folder, sections, resume, last_step, True)[0]


def test_train_resume_generate_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        small_run(tmp_path / name)
    one = run_workers(1, train, tmp_path / "one", 1, None, 4)[0]
    first = run_workers(2, train, tmp_path / "two", 2, None, 2)[0]
    checkpoint = tmp_path / "two" / "run" / "checkpoints" / "iter_0000002"
    rest = run_workers(2, train, tmp_path / "two", 2, checkpoint, 4)[0]
    losses = [[losses["loss"] for losses, _ in trace] for trace in (first + rest, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    run, exported = str(tmp_path / "two" / "run"), str(tmp_path / "exported")
    assert main(["convert", run, exported]) == 0
    prompt = tmp_path / "prompt"
    prompt.write_text("5 6 7 8 9\n")
    capsys.readouterr()
    texts = []
    for folder in (run, exported):
        assert main(["generate", folder, "--tokens", str(prompt), "--max-tokens", "6"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0].split()) >= 6
