"""Every command of docs/data.md about building runs and does what the page says."""

import re
import shlex
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from megatron_sse.cli import main
from tests.data.builder.support import TEXTS, documents, make_tokenizer, records, texts, write_lines

PAGE = (Path(__file__).resolve().parents[3] / "docs/data.md").read_text()
COMMANDS = re.findall(r"^ +megatron-sse (data (?:build|inspect|train-tokenizer) [a-z].*)$", PAGE, re.MULTILINE)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("texts.jsonl"), records())
    Path("shards").mkdir()
    parquet.write_table(arrow.table({"content": TEXTS}), "shards/0.parquet")
    make_tokenizer(Path("tokenizer"))
    Path("repos/one").mkdir(parents=True)
    Path("repos/one/latin.py").write_bytes(b"\xff")
    Path("repos/one/good.py").write_bytes(b"good\n")
    [examples] = re.findall(r"^ +(\{\"messages.*)\n +(\{\"prompt.*)$", PAGE, re.MULTILINE)
    write_lines(Path("chats.jsonl"), [line.encode() for line in examples])
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0
    assert texts(Path("data/texts")) == TEXTS and len(documents(Path("data/shards"))) == len(TEXTS)
    assert texts(Path("data/code")) == ["good\n"]
    [shown] = re.findall(r"template:\n\n((?:    .*\n)+)", PAGE)
    expected = re.sub("^    ", "", shown, flags=re.MULTILINE).removesuffix("4\n") + "⟦4\n⟧"
    printed = capsys.readouterr().out
    assert expected in printed and "2 + 2 = ⟦4⟧" in printed


def test_the_message_of_a_wrong_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [message] = re.findall(r"^ +(texts\.jsonl:3: .*)$", PAGE, re.MULTILINE)
    write_lines(Path("texts.jsonl"), [*records(["a", "b"]), b'{"text": x}'])
    assert main(["data", "build", "texts.jsonl", "--output", "out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message
