"""Files of wrong content that the manifest vouches for, and manifests themselves (F48): a run falls back from all."""

import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sse.checkpoint.folders import find_checkpoints
from megatron_sse.checkpoint.index import read_index
from megatron_sse.checkpoint.verify import first_intact
from tests.checkpoint.test_damage import folder, go_on, two_checkpoints, vouch, write
from tests.training.support import small_run
from tests.workers import run_workers

__all__ = ["folder", "two_checkpoints"]


def vouched(name: str, content: Any) -> Callable[[Path], None]:
    """Replace a file: by bytes, by JSON, or what torch.save makes of a value; the manifest fits it."""

    def replace(newest: Path) -> None:
        if name.endswith(".pt"):
            torch.save(content, newest / name)
        else:
            (newest / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        vouch(newest, name)

    return replace


def in_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; the manifest fits it, unless it is the file itself."""

    def change(newest: Path) -> None:
        values = json.loads((newest / name).read_text())
        (newest / name).write_text(json.dumps(values | changes))
        if name != "manifest.json":
            vouch(newest, name)

    return change


def in_index(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    """Change torch's index; the manifest fits it."""

    def replace(newest: Path) -> None:
        index = read_index(newest)
        change(index)
        (newest / ".metadata").write_bytes(pickle.dumps(index))
        vouch(newest, ".metadata")

    return replace


def first_entry(index: Metadata) -> Any:
    return next(iter(index.state_dict_metadata.values()))


def pipe(name: str) -> Callable[[Path], None]:
    def replace(newest: Path) -> None:
        (newest / name).unlink()
        os.mkfifo(newest / name)

    return replace


DEEP = b"[" * 100_000
GOOD_COMMON = {"step": 4, "consumed_samples": 8, "optimizer_step": 4}
# Files that are damaged although the manifest fits them (F48), and what the log says; a run resumes after step 2.
VOUCHED: dict[str, tuple[Callable[[Path], None], str]] = {
    "common.pt is a list": (vouched("common.pt", [1]), "common.pt: Input should be a valid dictionary"),
    "common.pt lacks a key": (vouched("common.pt", {"step": 4}), "common.pt: consumed_samples: Field required"),
    "common.pt has a string": (vouched("common.pt", GOOD_COMMON | {"step": "4"}), "common.pt: step: Input should be"),
    "common.pt has a tensor": (
        vouched("common.pt", GOOD_COMMON | {"optimizer_step": torch.ones(3)}),
        "common.pt: optimizer_step: Input should be a valid integer",
    ),
    "common.pt has a model": (vouched("common.pt", GOOD_COMMON | {"model0": {}}), "common.pt: model0: Extra inputs"),
    "common.pt is negative": (vouched("common.pt", GOOD_COMMON | {"step": -1}), "common.pt: step: Input should be"),
    "common.pt is a number": (vouched("common.pt", 3), "common.pt: Input should be a valid dictionary"),
    "data.json is a list": (vouched("data.json", []), r"data.json: cannot be read as JSON \(Input should be"),
    "data.json has no files": (vouched("data.json", {"files": 3}), r"data.json: cannot be read as JSON \(files"),
    "data.json is deep": (vouched("data.json", DEEP), r"data.json: cannot be read as JSON \(Invalid JSON: recursion"),
    "data.json is no text": (vouched("data.json", b"\xff\xfe"), r"data.json: cannot be read as JSON \(Invalid JSON"),
    "data.json has another place": (
        vouched("data.json", {"files": [], "position": {"stage": "x"}}),
        r"data.json: cannot be read as JSON \(position.stage: Input should be a valid integer",
    ),
    "config.yaml is a list": (vouched("config.yaml", b"[1, 2]"), "config.yaml: Input should be a valid dictionary"),
    "config.yaml is deep": (vouched("config.yaml", DEEP), "config.yaml:1: not valid YAML: nested too deeply"),
    "config.yaml has a tag": (vouched("config.yaml", b"a: !!bool x"), "config.yaml:1: not valid YAML: got the tag"),
    "config.yaml is no text": (vouched("config.yaml", b"\xff"), "config.yaml: cannot be read as a text file"),
    "metadata.json is a list": (vouched("metadata.json", []), "metadata.json: cannot be read as JSON"),
    "metadata.json names another format": (
        in_json("metadata.json", sharded_backend="zarr"),
        "metadata.json: cannot be",
    ),
    "metadata.json is deep": (vouched("metadata.json", DEEP), "metadata.json: cannot be read as JSON"),
    "manifest is deep": (write("manifest.json", DEEP), "manifest.json: cannot be read as JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "manifest.json: cannot be read as JSON"),
    "manifest has another layout": (in_json("manifest.json", layout=[]), "manifest.json: cannot be read as JSON"),
    "manifest has other versions": (
        in_json("manifest.json", versions={"torch": 2}),
        "manifest.json: cannot be read as",
    ),
    "manifest has a large step": (in_json("manifest.json", step=1 << 80), "manifest.json: cannot be read as JSON"),
    "manifest has a flag": (in_json("manifest.json", step=True), "manifest.json: cannot be read as JSON"),
    "a shard is a pipe": (pipe("__0_0.distcp"), "__0_0.distcp: not a regular file"),
    "the index is a pipe": (pipe(".metadata"), ".metadata: not a regular file"),
    "index with a size that is none": (
        in_index(lambda index: setattr(first_entry(index), "size", ["64"])),
        ".metadata: refused, its description of .* has wrong values",
    ),
    "index with parts outside": (
        in_index(lambda index: setattr(first_entry(index).chunks[0], "offsets", torch.Size([1 << 40, 0]))),
        ".metadata: refused, its description of .* has wrong values",
    ),
    "index without places": (
        in_index(lambda index: index.storage_data.clear()),
        ".metadata: refused, it has no place for .*",
    ),
    "index with a place outside": (
        in_index(lambda index: setattr(next(iter(index.storage_data.values())), "relative_path", "../../x")),
        ".metadata: refused, its places of tensors have wrong values",
    ),
    "index with a list for tensors": (
        in_index(lambda index: setattr(index, "state_dict_metadata", [])),
        ".metadata: refused, it does not list tensors by name",
    ),
    "index with an empty description": (
        in_index(lambda index: first_entry(index).__dict__.clear()),
        ".metadata: refused, it lacks values",
    ),
}


def choose(folder: Path) -> tuple[str, list[str]]:
    """Return the checkpoint that a run would resume from, and the log."""
    log: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_sse").addHandler(handler)
    try:
        chosen = first_intact(find_checkpoints(small_run(folder)), hashes=True)
    finally:
        logging.getLogger("megatron_sse").removeHandler(handler)
    return chosen.name if chosen is not None else "none", log


@pytest.mark.parametrize("fault", VOUCHED)
def test_files_that_the_manifest_vouches_for_are_checked(fault: str, folder: Path) -> None:
    damage, message = VOUCHED[fault]
    newest = folder / "run/checkpoints/iter_0000004"
    damage(newest)
    [(chosen, log)] = run_workers(1, choose, folder)
    assert chosen == "iter_0000002", log
    assert re.search(f"iter_0000004/{message}", "\n".join(log)), log


def test_a_run_falls_back_from_files_that_the_manifest_vouches_for(folder: Path) -> None:
    VOUCHED["data.json is a list"][0](folder / "run/checkpoints/iter_0000004")
    (first_step, log), (other_first_step, _) = run_workers(2, go_on, folder, {})
    assert first_step == other_first_step == 3, log
    assert any("falling back" in line for line in log)
