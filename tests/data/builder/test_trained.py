"""A run on a built file has its tokenizer: in the checkpoint, in generated text and in the export."""

import json
from pathlib import Path

import pytest

from megatron_sse.cli import main
from megatron_sse.data.builder.chat import DEFAULT_TEMPLATE
from megatron_sse.data.metadata import read_metadata
from megatron_sse.pretrained.chat import open_chat, user_says
from megatron_sse.pretrained.open import open_model
from megatron_sse.pretrained.text import open_tokenizer
from megatron_sse.training.loop import Signals
from tests.convert.support import convert
from tests.data.builder.support import TEXTS, make_tokenizer, records, run, write_lines
from tests.training.support import small_run, start
from tests.workers import run_workers


def train(folder: Path, vocab_size: int) -> None:
    training = {"steps": 2, "global_batch_size": 4, "precision": "fp32"}
    config = small_run(folder, model={"vocab_size": vocab_size}, training=training)
    start(config).run(Signals())


def test_tokenizer_goes_with_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(tmp_path / "tiny", begin=True)
    path = write_lines(tmp_path / "a.jsonl", records(TEXTS * 5))
    run(tmp_path / "train", path, tokenizer=str(tmp_path / "tiny"), unit_bytes=1 << 20)
    metadata = read_metadata(str(tmp_path / "train"))
    assert metadata is not None
    run_workers(1, train, tmp_path, metadata.vocab_size)
    checkpoint = tmp_path / "run/checkpoints/iter_0000002"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (checkpoint / name).read_bytes() == (tmp_path / f"train.{name}").read_bytes()
    (tmp_path / "tokens").write_text(" ".join(map(str, tokenizer.encode("words and").ids)))
    capsys.readouterr()
    answers = []
    for options in (["--prompt", "words and"], ["--tokens", str(tmp_path / "tokens")]):
        assert main(["generate", str(tmp_path / "run"), *options, "--max-tokens", "5"]) == 0
        answers.append(capsys.readouterr().out.rstrip("\n"))
    tokens = [int(token) for token in answers[1].split()]
    assert tokens and tokenizer.decode(tokens).startswith(answers[0])
    assert convert(str(tmp_path / "run"), str(tmp_path / "export")) == 0
    assert (tmp_path / "export/tokenizer.json").read_bytes() == (tmp_path / "tiny/tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "export/config.json").read_text())["eos_token_id"] == metadata.end == 1


def test_a_chat_template_for_bytes_goes_with_the_model(tmp_path: Path) -> None:
    """In the checkpoint, in the export and back."""
    template = DEFAULT_TEMPLATE.replace("message['content']", "message['content'] | upper")
    assert template != DEFAULT_TEMPLATE
    (tmp_path / "own.jinja").write_text(template)
    said = [user_says("two"), {"role": "assistant", "content": "four"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": said}] * 20)
    run(tmp_path / "train", path, format="chat", chat_template=str(tmp_path / "own.jinja"))
    run_workers(1, train, tmp_path, 257)
    assert convert(str(tmp_path / "run"), str(tmp_path / "export")) == 0
    assert convert(str(tmp_path / "export"), str(tmp_path / "back")) == 0
    for folder in (tmp_path / "run/checkpoints/iter_0000002", tmp_path / "export", tmp_path / "back"):
        assert (folder / "chat_template.jinja").read_text() == template
        opened = open_model("", folder)
        tokenizer = open_tokenizer(opened)
        assert b"TWO" in bytes(open_chat(opened, tokenizer).encode([user_says("two")]))
