"""Token files and their descriptions, of any content."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sse.data.metadata import read_metadata
from tests.data.builder.support import run, write_lines
from tests.fuzz.support import Contents, answers, broken_bytes, changed, refused_in_a_line


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": f"line {number} ", "completion": "x" * number} for number in range(9)]
    run(folder / "out", write_lines(folder / "a.jsonl", rows), format="chat")
    return folder / "out"


@pytest.fixture(scope="module")
def contents(prefix: Path) -> Contents:
    return Contents((name, Path(f"{prefix}.{name}").read_bytes()) for name in ("json", "idx", "bin", "mask"))


@given(st.data())
def test_a_description_of_any_kind(prefix: Path, contents: Contents, data: st.DataObject) -> None:
    path = Path(f"{prefix}.json")
    try:
        path.write_text(json.dumps(data.draw(changed(json.loads(contents["json"])))))
    # Numbers of more digits than Python writes.
    except ValueError:
        return
    try:
        refused_in_a_line(read_metadata, str(prefix))
        answers("data", "inspect", prefix)
    finally:
        path.write_bytes(contents["json"])


@given(st.data())
def test_files_of_any_bytes(prefix: Path, contents: Contents, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(contents)))
    path = Path(f"{prefix}.{name}")
    path.write_bytes(data.draw(broken_bytes(contents[name])))
    try:
        answers("data", "inspect", prefix)
    finally:
        path.write_bytes(contents[name])


def test_folders_in_the_place_of_files(prefix: Path) -> None:
    folders = prefix.with_name("folders")
    for name in ("json", "idx", "bin"):
        Path(f"{folders}.{name}").mkdir()
    answers("data", "inspect", folders)
