"""Wrong input is refused with its place or counted, as set; wrong requests are refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from megatron_sse import installed
from megatron_sse.errors import UserError
from tests.data.builder.support import make_tokenizer, records, run, texts, write_lines

GOOD = {"text": "good"}
CHAT = {"prompt": "p", "completion": "c"}
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
# Name: (a bad line between good ones, options, the error, the kind that is counted)
LINES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "broken": (b'{"text": "a', {}, "broken JSON", "broken JSON"),
    "deep": (b"[" * 100_000, {"unit_bytes": 1 << 16}, "broken JSON", "broken JSON"),
    "no object": (b'["text"]', {}, "a JSON list, must be an object", "broken JSON"),
    "invalid": (b'{"text": "a\xff"}', {}, r"invalid UTF-8 at byte 11 \(b'\\xff\"}", "invalid UTF-8"),
    "surrogate": (b'{"text": "\\ud83d"}', {}, "invalid UTF-8 .surrogates", "invalid UTF-8"),
    "missing": ({"txt": "a"}, {}, r"field text missing \(found: txt; choose another with --field\)", "missing field"),
    "null": ({"text": None}, {}, "field text missing", "missing field"),
    "number": ({"text": 5}, {}, "field text is int, must be text", "missing field"),
    "chat as text": ({"messages": TURNS}, {}, "chats are read with --format chat", "missing field"),
    "empty": ({"text": ""}, {"empty": "refuse"}, "empty document", "empty document"),
    "no chat": (
        {"text": "a"},
        {"format": "chat"},
        "field messages missing, no conversations, and no prompt",
        "missing field",
    ),
    "no completion": ({"prompt": "a"}, {"format": "chat"}, "completion is missing", "chat not usable"),
    "number in chat": ({"prompt": 5, "completion": "a"}, {"format": "chat"}, "prompt is int", "chat not usable"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"format": "chat"},
        "1: content has a part of type 'image'",
        "chat not",
    ),
    "speaker": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        {"format": "chat"},
        "1: from: got 'narrator'",
        "chat not",
    ),
    "unhashable speaker": (
        {"conversations": [{"from": [], "value": "a"}]},
        {"format": "chat"},
        "1: from: got",
        "chat not",
    ),
    "no turns": ({"messages": []}, {"format": "chat"}, "must be a list of", "chat not usable"),
    "no role": ({"messages": [{"content": "a"}]}, {"format": "chat"}, "1: must be an object with role", "chat not"),
    "no content": ({"messages": [{"role": "user"}]}, {"format": "chat"}, "1: has no content", "chat not usable"),
    "no answer": ({"messages": TURNS[:1]}, {"format": "chat"}, "no assistant turn", "chat not usable"),
    "empty answer": ({"prompt": "p", "completion": ""}, {"format": "chat", "empty": "refuse"}, "empty answer", "empty"),
    "surrogate in chat": (b'{"prompt": "\\ud83d", "completion": "c"}', {"format": "chat"}, "invalid UTF-8", "invalid"),
}


@pytest.mark.parametrize("name", LINES)
def test_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, options, message, kind = LINES[name]
    good = CHAT if options.get("format") == "chat" else GOOD
    path = write_lines(tmp_path / "a.jsonl", [good, good, line, good])
    with pytest.raises(UserError, match=f"^{path}:3: .*{message}") as caught:
        run(tmp_path / "out", path, **options)
    assert "\n" not in str(caught.value) and re.search(r"--(wrong|empty) skip$", str(caught.value))
    assert not (tmp_path / "out.idx").exists()
    # Parts that were built before the error are reused.
    assert run(tmp_path / "out", path, **options | {"wrong": "skip", "empty": "skip"}) == 0
    assert f"skipped: 1 x {kind}" in capsys.readouterr().out
    assert len(texts(tmp_path / "out")) == 3


def test_places_in_gzip_and_parquet(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", [GOOD, GOOD, b"{"])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:3: broken JSON"):
        run(tmp_path / "out", path)
    content = arrow.array([b"good", b"good", b"\xff", None], arrow.binary())
    table = arrow.table({"text": content.view(arrow.string())})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(UserError, match=r"a\.parquet:3: invalid UTF-8 at byte 0"):
        run(tmp_path / "out", tmp_path / "a.parquet")
    run(tmp_path / "out", tmp_path / "a.parquet", wrong="skip")
    assert texts(tmp_path / "out") == ["good", "good"]


def test_invalid_and_binary_files_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "repos/a").mkdir(parents=True)
    (tmp_path / "repos/a/latin.py").write_bytes(b"# \xe4\n")
    (tmp_path / "repos/a/good.py").write_bytes(b"good\n")
    (tmp_path / "repos/a/binary").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"repos/a/latin\.py: invalid UTF-8 at byte 2"):
        run(tmp_path / "out", tmp_path / "repos")
    run(tmp_path / "out", tmp_path / "repos", wrong="skip")
    assert texts(tmp_path / "out") == ["good\n"]
    assert "skipped: 1 x binary file, 1 x invalid UTF-8" in capsys.readouterr().out


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20:60] = b"\0" * 40
    path.write_bytes(content)


def test_damaged_files(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", records([f"text {number}" for number in range(200)]))
    damage(path)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: damaged gzip file"):
        run(tmp_path / "out", path, wrong="skip")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["word " * 50] * 50}), path)
    damage(path)
    with pytest.raises(UserError, match=r"a\.parquet:1: damaged Parquet file"):
        run(tmp_path / "out", path, wrong="skip")
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        run(tmp_path / "out", path)


# Name: (options, the error)
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "csv"}, "--format: got csv, allowed auto, jsonl, text"),
    "wrong": ({"wrong": "count"}, "--wrong: got count, allowed refuse, skip"),
    "empty": ({"empty": "keep"}, "--empty: got keep, allowed refuse, skip"),
    "workers": ({"workers": 0}, "--workers: got 0, allowed 1 to 1024"),
    "end of bytes": ({"end": "<end>"}, "--end: got <end>, but --tokenizer bytes has an end of its own"),
    "template without chat": ({"chat_template": "x"}, "--chat-template: given, but --format is not chat"),
    "no template": ({"format": "chat", "chat_template": "none"}, "--chat-template: none cannot be read"),
    "no tokenizer": ({"tokenizer": "none"}, "--tokenizer: none not found; give bytes, a tokenizer.json or"),
    "file as folder": ({"format": "folder"}, "INPUT: .*a.jsonl is a file, but --format is folder"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request(name: str, tmp_path: Path) -> None:
    options, message = REQUESTS[name]
    with pytest.raises(UserError, match=f"^{message}") as caught:
        run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records()), **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_inputs_and_outputs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = write_lines(tmp_path / "in" / "a.jsonl", records())
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("no table")
    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    for given, output, options, message in (
        ([tmp_path / "none"], "out", {}, r"INPUT: .*/none not found"),
        ([tmp_path / "empty.jsonl"], "out", {}, r"INPUT: nothing to read in .*empty\.jsonl"),
        ([tmp_path / "in"], "out", {}, r"INPUT: .*/in holds a\.jsonl; give --format jsonl or parquet"),
        ([tmp_path / "in"], "in/out", {"format": "jsonl"}, r"--output: .*in/out is inside .*/in, which is read"),
        ([tmp_path / "a.txt"], "out", {"format": "chat"}, r"INPUT: .*a\.txt is not a \.jsonl"),
        ([tmp_path / "a.parquet"], "out", {}, r"--field: .*a\.parquet has columns body, needed text"),
        ([path], "out.bin", {}, r"--output: got .*out\.bin, allowed the prefix"),
        ([path], "a.txt/out", {}, r"--output: .*a\.txt/out cannot be written \(Not a directory"),
        ([write_lines(tmp_path / "e.jsonl", [{"text": ""}])], "out", {}, r"INPUT: no documents in .*1 x empty"),
    ):
        with pytest.raises(UserError, match=f"^{message}") as caught:
            run(tmp_path / output, *given, **options)
        assert "\n" not in str(caught.value)


def test_a_finished_file_is_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", records())
    run(tmp_path / "out", path)
    with pytest.raises(UserError, match=r"^--output: .*out\.idx exists already; delete it or give another prefix"):
        run(tmp_path / "out", path)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path, folder = write_lines(tmp_path / "a.jsonl", [CHAT, {"messages": TURNS}]), tmp_path / "tokenizer"
    make_tokenizer(folder, eos_token=None)
    for end, message in (
        (None, r"--end: not given, and .*tokenizer_config\.json names no eos_token; give the token"),
        ("<stop>", r"--end: '<stop>' is not a token of .*; its special tokens: <begin>, <end>, <\|user"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            run(tmp_path / "out", path, tokenizer=str(folder), end=end)
    with pytest.raises(UserError, match=r"^--chat-template: the tokenizer has none \(chat_template\.jinja"):
        run(tmp_path / "out", path, tokenizer=str(folder), end="<end>", format="chat")
    (tmp_path / "template").write_text("{% for %}")
    with pytest.raises(UserError, match=r"template:1: cannot be read as a chat template"):
        run(tmp_path / "out", path, format="chat", chat_template=str(tmp_path / "template"))
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read as JSON \(Invalid JSON"):
        run(tmp_path / "out", path, tokenizer=str(folder))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as tokenizer\.json"):
        run(tmp_path / "out", path, tokenizer=str(folder), end="<end>")


def test_packages_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", records())
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    make_tokenizer(tmp_path / "tokenizer")
    find = installed.importlib.util.find_spec
    for package, given, options in (
        ("tqdm", path, {}),
        ("pyarrow", tmp_path / "a.parquet", {}),
        ("tokenizers", path, {"tokenizer": str(tmp_path / "tokenizer")}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                installed.importlib.util, "find_spec", lambda name, p=package: None if name == p else find(name)
            )
            with pytest.raises(UserError, match=rf'needs {package}, .*: pip install "megatron-sse\[data\]"$'):
                run(tmp_path / "out", given, **options)


def test_without_matplotlib_there_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = installed.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records()), picture=True)
    assert "out.lengths.png not drawn: needs matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out.lengths.png").exists()
