"""megatron-sse inspect: tables, and exit status 1 for damage."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_sse import reading
from megatron_sse.checkpoint import common, index
from megatron_sse.cli import main
from tests.checkpoint.support import train_and_save
from tests.training.support import small_run
from tests.workers import run_workers


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    small_run(folder)
    sections = {"parallel": {"tensor": 2}, "training": {"steps": 3, "global_batch_size": 2, "precision": "bf16"}}
    run_workers(2, train_and_save, folder, sections, None, 3, True)
    return folder / "run"


def test_tables(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_folder), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run_folder / "checkpoints/iter_0000003")
    assert "  step               3" in lines and "  holds              weights and optimizer" in lines
    [layout] = [line for line in lines if "saved at" in line]
    assert "world 2, tensor 2, pipeline 1" in layout and layout.endswith("data 1, distributed_optimizer on")
    words = [line.split() for line in lines]
    # There are 46,448 parameters, of which the router's 4 x 32 are fp32.
    for kind, dtype, elements in (
        ("weights", "bfloat16", "46,320"),
        ("weights", "float32", "128"),
        ("optimizer.exp_avg", "float32", "46,448"),
        ("optimizer.master", "float32", "46,320"),
    ):
        assert [line for line in words if line[:2] == [kind, dtype] and line[3] == elements], (kind, dtype)
    assert "embedding.word_embeddings.weight bfloat16 2 128 x 32".split() in words
    manifest = json.loads((run_folder / "checkpoints/iter_0000003/manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert [line for line in words if line and line[0] == name and line[-2:] == [entry["sha256"], "intact"]]
    assert lines[-1] == "sizes and hashes of all files match the manifest"


def test_damage_is_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_folder / "checkpoints/iter_0000003"
    shard, index = checkpoint / "__1_0.distcp", checkpoint / ".metadata"
    contents = shard.read_bytes(), index.read_bytes()
    shard.write_bytes(contents[0][:-1])
    assert main(["inspect", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{shard}: has {len(contents[0]) - 1} bytes" in out and "damaged" in out
    index.write_bytes(b"anything")
    assert main(["inspect", str(checkpoint)]) == 1
    assert f"{index}: has 8 bytes" in capsys.readouterr().out
    shard.write_bytes(contents[0])
    index.write_bytes(contents[1])
    assert main(["inspect", str(checkpoint), "--sizes"]) == 0


def test_files_whose_hash_is_wrong_are_not_opened(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "iter_0000003"
    shutil.copytree(run_folder / "checkpoints/iter_0000003", checkpoint)
    for name in ("common.pt", "data.json", "metadata.json", "config.yaml", "tokens.json"):
        (checkpoint / name).write_bytes(b"anything")
    opened: list[str] = []
    read = reading.read_bytes
    for module in (common, index, reading):
        monkeypatch.setattr(module, "read_bytes", lambda path, limit: (opened.append(path.name), read(path, limit))[1])
    assert main(["inspect", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert set(opened) == {"manifest.json", ".metadata"} and f"{checkpoint / 'common.pt'}: has 8 bytes" in out
    # A file that waits for its writer is not read either.
    (checkpoint / "common.pt").unlink()
    os.mkfifo(checkpoint / "common.pt")
    assert main(["inspect", str(checkpoint)]) == 1
    assert f"{checkpoint / 'common.pt'}: not a regular file" in capsys.readouterr().out


def test_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"DIR: {tmp_path} holds no checkpoint; give the path of") and error.count("\n") == 1
