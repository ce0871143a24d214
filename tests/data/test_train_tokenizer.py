"""`data train-tokenizer`: a tokenizer that encodes any text and that `data build` takes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_sse.cli import main
from megatron_sse.data.metadata import read_metadata
from tests.data.builder.support import documents, records, write_lines


def test_made_of_lines_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*records(["words and words " * 20, "def f(x):\n"]), b"{"])
    folder, prefix = tmp_path / "made" / "tokenizer", tmp_path / "tokens"
    options = ["--output", str(folder), "--vocab-size", "270", "--special", "<|user|>"]
    train = ["data", "train-tokenizer", str(lines), *options]
    assert main(train) == 2 and ":3: broken JSON" in capsys.readouterr().err and not folder.exists()
    assert main([*train, "--wrong", "skip"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{folder}: 270 tokens; model.vocab_size needs as many\nskipped: 1 x broken JSON\n"
    build = ["data", "build", str(lines), "--output", str(prefix), "--wrong", "skip", "--workers", "1"]
    assert main([*build, "--tokenizer", str(folder)]) == 0
    metadata = read_metadata(str(prefix))
    assert metadata is not None and metadata.vocab_size == 270
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert documents(prefix)[1].tolist() == [*tokenizer.encode("def f(x):\n").ids, metadata.end]
    assert tokenizer.token_to_id("<|endoftext|>") == metadata.end and tokenizer.token_to_id("<|user|>") is not None
    # A text that it has never seen, and a special token.
    text = "zwölf 🐈 Größe\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text and len(tokenizer.encode("<|user|>").ids) == 1
    assert len(tokenizer.encode("words and words").ids) < 8
    assert main(train) == 2 and "exists and is not overwritten" in capsys.readouterr().err


WRONG = {
    "small": (["--vocab-size", "256"], "--vocab-size: got 256, allowed 257 (256 bytes and the special tokens) to 2^24"),
    "twice": (["--special", "<|endoftext|>"], "--end, --special: got '<|endoftext|>', '<|endoftext|>', allowed"),
    "chat": (["--format", "chat"], "--format: got chat, allowed auto"),
    "empty": ([], "INPUT: no text to learn from"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_refuses(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("")
    command = ["data", "train-tokenizer", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(message) and not (tmp_path / "out").exists()
