"""`data inspect`: its output, and its errors for damaged files."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_sse.cli import main
from tests.data.builder.support import make_tokenizer, records, run, write_lines
from tests.data.files import write_tokens
from tests.data.test_checks import edit, put


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["data", "inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records(["first\n", "zwölf\x1b[31m", "x" * 600])))
    printed = shown(capsys, tmp_path / "out")
    assert "out.bin: 1,240 bytes, uint16\n3 documents, 620 tokens, 617 bytes of text\ntokenizer bytes: 257" in printed
    assert "longest document 601 tokens, median 12; 0 empty" in printed and "512 to 1,023" in printed
    assert printed.endswith("\n--- document 0: 7 tokens\nfirst\n\n")
    printed = shown(capsys, tmp_path / "out", "--first", 1, "--documents", 9, "--tokens", 20)
    assert "--- document 1: 12 tokens\nzwölf\\x1b[31m\n" in printed
    assert printed.endswith(f"--- document 2: 601 tokens\n{'x' * 20}\n... (581 more)\n")


def test_what_steers_a_terminal_is_made_visible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control sequences and bidirectional controls of texts and of the tokenizer's name."""
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records(["a\x1b]0;title\x07 \u202egnp.\u2066 \x9b2J ü"])))
    printed = shown(capsys, tmp_path / "out")
    assert "a\\x1b]0;title\\x07 \\u202egnp.\\u2066 \\x9b2J ü\n" in printed
    metadata = tmp_path / "out.json"
    metadata.write_text(metadata.read_text().replace('"bytes",', '"bytes\\u001b[2J\\u202e",', 1))
    printed = shown(capsys, tmp_path / "out")
    assert not set("\x1b\x07\x9b\u202e\u2066") & set(printed)
    assert "tokenizer bytes\\x1b[2J\\u202e" in printed


def test_labels_are_in_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(tmp_path / "tiny")
    rows = [{"prompt": "two and ", "completion": "words"}, {"prompt": "a", "completion": "ü🐈"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    run(tmp_path / "out", path, format="chat", tokenizer=str(tmp_path / "tiny"))
    printed = shown(capsys, tmp_path / "out", "--documents", 2)
    assert "\ntwo and \u27e6words<end>\u27e7\n" in printed and "\na\u27e6ü🐈<end>\u27e7\n" in printed
    assert " tokens count as labels (" in printed


def test_files_of_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(str(tmp_path / "theirs"), [[5, 6, 7], [8]], dtype=np.int32)
    printed = shown(capsys, tmp_path / "theirs", "--documents", 2)
    assert "2 documents, 4 tokens; " in printed and "theirs.json not found: the tokenizer is unknown" in printed
    assert "--- document 0: 3 tokens\n5 6 7 \n" in printed


def unlink_mask(prefix: str) -> None:
    Path(prefix + ".mask").unlink()


# Name: (a change to the files, the error)
DAMAGES = {
    "idx": (lambda p: put(p + ".idx", 0, "<B", 0), r"out.idx: not an index of a Megatron token file"),
    "idx cut": (lambda p: edit(p + ".idx", lambda d: d.__delitem__(slice(-8, None))), r"out.idx: .* truncated"),
    "bin cut": (lambda p: edit(p + ".bin", lambda d: d.__delitem__(slice(-6, None))), r"out.bin: .* truncated"),
    "token": (lambda p: put(p + ".bin", 4, "<H", 300), r"out.bin holds token id 300 at token 2, .* = 256"),
    "mask": (unlink_mask, r"out.mask: missing, or not"),
    "json": (lambda p: Path(p + ".json").write_text("{"), r"out.json: not readable"),
    "gone": (lambda p: Path(p + ".bin").unlink(), r"PREFIX: .*out.bin not found"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}]), format="chat")
    spoil, message = DAMAGES[name]
    spoil(str(tmp_path / "out"))
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert re.search(message, errors), errors


def test_documents_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(str(tmp_path / "theirs"), [[5, 6, 7], [8]])
    assert main(["data", "inspect", str(tmp_path / "theirs"), "--first", "2"]) == 2
    assert capsys.readouterr().err == "--first: got 2, allowed 0 to 1, the last document\n"
    assert main(["data", "inspect", str(tmp_path / "theirs"), "--documents", "-1"]) == 2
    assert capsys.readouterr().err == "--documents: got -1, allowed 0 or more\n"
