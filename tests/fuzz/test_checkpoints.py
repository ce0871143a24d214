"""Checkpoints with files of any content."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.support import train_and_save
from tests.fuzz.support import Contents, answers, broken_bytes, changed
from tests.training.support import small_run
from tests.workers import run_workers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    small_run(folder)
    run_workers(1, train_and_save, folder, {}, None, 1, True)
    return next((folder / "run/checkpoints").glob("iter_*"))


@pytest.fixture(scope="module")
def contents(checkpoint: Path) -> Contents:
    return Contents((path.name, path.read_bytes()) for path in checkpoint.iterdir() if path.is_file())


@given(st.data())
def test_files_of_any_bytes(checkpoint: Path, contents: Contents, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(contents)))
    change(checkpoint / name, data.draw(broken_bytes(contents[name])), contents[name])


@given(st.data())
def test_json_of_any_kind(checkpoint: Path, contents: Contents, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(name for name in contents if name.endswith(".json"))))
    try:
        content = json.dumps(data.draw(changed(json.loads(contents[name])))).encode()
    # Numbers of more digits than Python writes.
    except ValueError:
        return
    change(checkpoint / name, content, contents[name])


def change(path: Path, content: bytes, right: bytes) -> None:
    path.write_bytes(content)
    try:
        answers("inspect", path.parent)
    finally:
        path.write_bytes(right)


def test_folders_in_the_place_of_files(checkpoint: Path, contents: Contents, tmp_path: Path) -> None:
    for name in contents:
        copied = tmp_path / name / checkpoint.name
        shutil.copytree(checkpoint, copied)
        (copied / name).unlink()
        (copied / name).mkdir()
        answers("inspect", copied)
    latest = checkpoint.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.mkdir()
    answers("inspect", checkpoint.parent)
