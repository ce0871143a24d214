"""Damaged checkpoints: the file is named, and a run falls back to the checkpoint before it (F7 to F13, F16, F17)."""

import errno
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from megatron_sse.checkpoint import manifest
from megatron_sse.checkpoint.folders import find_all_damage, find_checkpoints
from megatron_sse.checkpoint.verify import first_intact
from megatron_sse.durable import sha256_of
from megatron_sse.errors import UserError
from megatron_sse.training.loop import Signals
from tests.checkpoint.support import save, take_steps
from tests.training.support import small_run, start
from tests.workers import run_workers

PARALLEL = {"distributed_optimizer": True}
TRAINING = {"steps": 5, "global_batch_size": 2, "precision": "fp32"}


def save_two(folder: Path) -> None:
    """Save checkpoints after steps 2 and 4 of a run on two ranks, each of which writes a file."""
    run = start(small_run(folder, parallel=PARALLEL, training=TRAINING))
    take_steps(run, 2)
    save(run, 2)
    run.first_step = 3
    take_steps(run, 4)
    save(run, 4)


def go_on(folder: Path, sections: dict[str, Any]) -> tuple[int | str, list[str]]:
    """Resume the run as the command line does, and return its first step or its error, and the log."""
    log: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_sse")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        config = small_run(folder, **{"parallel": PARALLEL, "training": TRAINING} | sections)
        run = start(config, first_intact(find_checkpoints(config), config.checkpoint.verify == "hashes"))
        first_step = run.first_step
        run.run(Signals())
        return first_step, log
    except UserError as error:
        return str(error), log
    finally:
        logger.removeHandler(handler)


def fail_to_read_on_rank_1(folder: Path) -> str:
    """Resume where rank 1 alone cannot read, and return the error."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(FileSystemReader, "read_data", raise_input_output_error)
        first_step, _ = go_on(folder, {})
    return str(first_step)


def raise_input_output_error(*args: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    small_run(folder)
    run_workers(2, save_two, folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, two_checkpoints: Path) -> Path:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_all_ranks_know_that_one_cannot_read(folder: Path) -> None:
    results = run_workers(2, fail_to_read_on_rank_1, folder)
    assert len(set(results)) == 1 and re.search(r"iter_0000004: cannot be loaded \(.*Input/output error\)", results[0])


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def vouch(newest: Path, name: str) -> None:
    """Make the manifest match a changed file, as an attacker would."""
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = {"size": (newest / name).stat().st_size, "sha256": sha256_of(newest / name)}
    (newest / "manifest.json").write_text(json.dumps(manifest))


def truncate(newest: Path) -> None:
    os.truncate(newest / "__1_0.distcp", 1000)


def flip_byte(newest: Path) -> None:
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(content)


def swap(newest: Path) -> None:
    (newest / "__0_0.distcp").rename(newest / "other")
    (newest / "__1_0.distcp").rename(newest / "__0_0.distcp")
    (newest / "other").rename(newest / "__1_0.distcp")


def pickle_payload(newest: Path) -> None:
    (newest / ".metadata").write_bytes(pickle.dumps(Payload(newest / "run by pickle")))


def vouched_payload(newest: Path) -> None:
    pickle_payload(newest)
    vouch(newest, ".metadata")


def vouched_common_payload(newest: Path) -> None:
    torch.save({"step": Payload(newest / "run by pickle")}, newest / "common.pt")
    vouch(newest, "common.pt")


def unlisted(newest: Path) -> None:
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"]["__1_0.distcp"]
    (newest / "manifest.json").write_text(json.dumps(manifest))


def remove(name: str) -> Callable[[Path], None]:
    return lambda newest: (newest / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda newest: (newest / name).write_bytes(content) and None


def half_written(newest: Path) -> None:
    """Leave an interrupted save, and one by an older version that did not rename folders."""
    for name in ("partial_iter_0000006", "iter_0000008"):
        (newest.parent / name).mkdir()
        (newest.parent / name / "__0_0.distcp").write_bytes(b"half")


# Fault: how it is made, the first step afterwards, what the log says.
DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "F7 truncated shard": (truncate, 3, r"iter_0000004/__1_0.distcp: has 1000 bytes, the manifest says \d+"),
    "F8 flipped byte": (flip_byte, 3, "iter_0000004/__0_0.distcp: its SHA-256 is not the manifest's"),
    "F9 missing shard": (remove("__1_0.distcp"), 3, "iter_0000004/__1_0.distcp: not found"),
    "F9 mixed-up shards": (swap, 3, "iter_0000004/__0_0.distcp: "),
    "F9 shard not in the manifest": (unlisted, 3, "iter_0000004/__1_0.distcp: not in the manifest"),
    "F10 missing index": (remove(".metadata"), 3, "iter_0000004/.metadata: not found"),
    "F10 missing description": (remove("metadata.json"), 3, "iter_0000004/metadata.json: not found"),
    "F10 missing manifest": (remove("manifest.json"), 3, "iter_0000004 is ignored: it is not a complete checkpoint"),
    "F10 garbage manifest": (write("manifest.json", b"{"), 3, r"iter_0000004/manifest.json: cannot be read as JSON \("),
    "F11 empty shard": (write("__0_0.distcp", b""), 3, "iter_0000004/__0_0.distcp: has 0 bytes, the manifest says"),
    "F12 garbage pointer": (write("../latest", b"\x00\xff garbage"), 5, "latest is ignored: it names no complete"),
    "F12 pointer to nothing": (write("../latest", b"iter_0000009\n"), 5, "latest is ignored: it names no complete"),
    "F13 half-written folder": (half_written, 5, "partial_iter_0000006 is ignored: it is not a complete checkpoint"),
    "F13 folder without manifest": (half_written, 5, "iter_0000008 is ignored: it is not a complete checkpoint"),
    "F16 pickle payload": (pickle_payload, 3, "iter_0000004/.metadata: "),
    "F16 vouched payload": (vouched_payload, 3, "iter_0000004/.metadata: refused, it asks for posix.mkdir"),
    "F16 payload in common.pt": (vouched_common_payload, 3, "iter_0000004/common.pt: refused, "),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_run_falls_back_and_says_so(fault: str, folder: Path) -> None:
    damage, expected, message = DAMAGE[fault]
    newest = folder / "run/checkpoints/iter_0000004"
    damage(newest)
    (first_step, log), (other_first_step, _) = run_workers(2, go_on, folder, {})
    assert first_step == other_first_step == expected, log
    assert re.search(message, "\n".join(log)), log
    if expected == 3:
        assert any("falling back" in line or "ignored" in line for line in log)
    assert not (newest / "run by pickle").exists()
    # The run has saved again: the incomplete folders are gone, and all checkpoints are intact.
    assert (folder / "run/checkpoints/latest").read_text() == "iter_0000005\n"
    assert not (folder / "run/checkpoints/partial_iter_0000006").exists()


def test_a_damaged_path_is_an_error_and_so_is_no_intact_checkpoint(folder: Path) -> None:
    checkpoints = folder / "run/checkpoints"
    truncate(checkpoints / "iter_0000004")
    named = {"checkpoint": {"resume": str(checkpoints / "iter_0000004")}}
    for error, _ in run_workers(2, go_on, folder, named):
        assert re.fullmatch(
            r"checkpoint.resume: no checkpoint is intact: \S+__1_0.distcp: has 1000 bytes, .*", str(error)
        )
    remove("common.pt")(checkpoints / "iter_0000002")
    for error, _ in run_workers(2, go_on, folder, {}):
        assert "iter_0000004/__1_0.distcp" in str(error) and "iter_0000002/common.pt: not found" in str(error)


def test_sizes_alone_miss_a_flipped_byte_only_in_large_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = folder / "run/checkpoints/iter_0000004"
    flip_byte(newest)
    assert find_all_damage(newest, hashes=False)
    monkeypatch.setattr(manifest, "_SMALL", 10)
    assert not find_all_damage(newest, hashes=False)
    assert find_all_damage(newest, hashes=True)


ARCHITECTURES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"num_layers": 4},
        [
            "  model.num_layers: 2 in the checkpoint, 4 in this run",
            "  decoder.layers.2.mlp.linear_fc1.weight: not in the checkpoint, 256 x 32 in this run",
        ],
    ),
    (
        {"layers": "gla, softmax"},
        [
            "  model.layers: 'sse, softmax' in the checkpoint, 'gla, softmax' in this run",
            "  decoder.layers.0.self_attention.router.proj.weight: 4 x 32 in the checkpoint, not in this run",
        ],
    ),
    ({"vocab_size": 100}, ["  model.vocab_size: 64 in the checkpoint, 100 in this run"]),
    (
        {"ffn_hidden_size": 64},
        ["  decoder.layers.0.mlp.linear_fc2.weight: 32 x 128 in the checkpoint, 32 x 64 in this run"],
    ),
]


@pytest.mark.parametrize(("changes", "lines"), ARCHITECTURES, ids=str)
def test_another_architecture_gives_a_table(changes: dict[str, Any], lines: list[str], folder: Path) -> None:
    """A checkpoint of another architecture is refused with a table of differences (F17)."""
    for error, _ in run_workers(2, go_on, folder, {"model": changes}):
        first, *table = str(error).splitlines()
        assert first.endswith("iter_0000004: the checkpoint's architecture differs from that of this run")
        assert len(table) <= 21
        assert [line for line in lines if line not in table] == [], table
