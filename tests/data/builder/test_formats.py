"""Every format is read into its documents, for any number of units and workers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sse.data.checks import read_index
from megatron_sse.data.metadata import read_metadata
from megatron_sse.data.tokenizer import END_OF_DOCUMENT
from tests.data.builder.support import TEXTS, documents, files, records, run, texts, write_lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1 << 20])
def test_jsonl(tmp_path: Path, name: str, unit_bytes: int) -> None:
    # One unit per byte is slow, so these files are small.
    given = TEXTS if unit_bytes > 1 else ["a", "ü", "b"]
    assert run(tmp_path / "out", write_lines(tmp_path / name, records(given)), unit_bytes=unit_bytes) == 0
    assert texts(tmp_path / "out") == given
    assert all(document[-1] == END_OF_DOCUMENT for document in documents(tmp_path / "out"))


def test_a_line_without_an_end_a_mark_at_the_start_and_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"body": "one"}\r\n{"body": "two"}')
    run(tmp_path / "out", path, field="body", unit_bytes=1)
    assert texts(tmp_path / "out") == ["one", "two"]


@pytest.mark.parametrize(
    "kind", [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())]
)
def test_parquet(tmp_path: Path, kind: arrow.DataType) -> None:
    columns = {"id": arrow.array(range(6)), "text": arrow.array(TEXTS).cast(kind)}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=2)
    run(tmp_path / "out", tmp_path / "a.parquet")
    assert texts(tmp_path / "out") == TEXTS


def test_text_files_in_the_order_given(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, newline="")
    paths = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    run(tmp_path / "out", *reversed(paths))
    assert texts(tmp_path / "out") == TEXTS[::-1]


def make_sources(folder: Path) -> Path:
    for name, content in {
        "b/x.py": b"x = 1",
        "b/a/y.py": b"y = 2\n",
        "b/.git/config": b"hidden",
        "b/picture.png": b"\x89PNG\0\0",
        "a.md": b"# beside",
        "c/z.txt": "ü".encode(),
        "d/.only": b"hidden",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to(folder / "b")
    return folder


def test_folders_of_source_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", make_sources(tmp_path / "repos"))
    assert texts(tmp_path / "out") == ["# beside", "y = 2\nx = 1\n", "ü"]
    printed = capsys.readouterr().out
    assert "skipped: 1 x binary file, 1 x folder without files, 3 x hidden file, hidden folder or link" in printed


def test_a_folder_as_text_files_and_of_tables(tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "repos")
    run(tmp_path / "out", sources, format="text")
    assert texts(tmp_path / "out") == ["# beside", "y = 2\n", "x = 1", "ü"]
    (tmp_path / "tables" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "tables" / "b.jsonl", records(["b"]))
    write_lines(tmp_path / "tables" / "deep" / "a.jsonl.gz", records(["a"]))
    (tmp_path / "tables" / "README").write_text("no table")
    run(tmp_path / "tables_out", tmp_path / "tables", format="jsonl")
    assert texts(tmp_path / "tables_out") == ["b", "a"]


def test_the_same_bytes_with_any_number_of_workers_and_any_units(tmp_path: Path) -> None:
    inputs = [write_lines(tmp_path / "a.jsonl", records(TEXTS * 5)), make_sources(tmp_path / "repos")]
    run(tmp_path / "one", *inputs)
    for name, options in {"two": {"workers": 2}, "whole": {"unit_bytes": 1 << 30}}.items():
        run(tmp_path / name, *inputs, **options)
        assert files(tmp_path / name) == files(tmp_path / "one")
    assert sorted(files(tmp_path / "one")) == [".bin", ".idx", ".json"]
    assert not list(tmp_path.glob("*.building"))


def test_the_index_is_megatrons(tmp_path: Path) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records()))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents(tmp_path / "out"):
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert read_index(tmp_path / "out.idx").num_tokens == sum(len(text.encode()) + 1 for text in TEXTS)


def test_metadata_counts_and_the_code_length_of_the_files_own_frequencies(tmp_path: Path) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records(["aab", "b", ""])))
    metadata = read_metadata(str(tmp_path / "out"))
    assert metadata is not None
    assert (metadata.documents, metadata.tokens, metadata.bytes, metadata.end) == (2, 6, 4, 256)
    # Six tokens, two each of a, b and the end, have log2(3) bits each.
    assert np.isclose(metadata.unigram_bits_per_byte, 6 * np.log2(3) / 4)
    assert json.loads((tmp_path / "out.json").read_text())["loss_mask"] is False


def test_summary_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", write_lines(tmp_path / "a.jsonl", records(["a" * 3, "b" * 4, "c" * 100, ""])), picture=True)
    printed = capsys.readouterr().out
    assert "3 documents, 110 tokens, 107 bytes of text" in printed
    assert "1.0280 tokens per byte" in printed and "skipped: 1 x empty document" in printed
    rows = [line.split() for line in printed.splitlines() if " to " in line]
    assert [row[:6] for row in rows] == [
        ["4", "to", "7", "2", "66.7%", "9"],
        *([str(1 << k), "to", str((2 << k) - 1), "0", "0.0%", "0"] for k in (3, 4, 5)),
        ["64", "to", "127", "1", "33.3%", "101"],
    ]
    assert (tmp_path / "out.lengths.png").read_bytes().startswith(b"\x89PNG")
