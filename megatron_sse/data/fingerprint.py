"""A description of everything that decides which samples a run sees, to compare on resume."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_sse.config import DataConfig, Source, StageRun
from megatron_sse.data.checks import check_exists
from megatron_sse.data.problems import hash_problems
from megatron_sse.data.sources import name_sources
from megatron_sse.data.tasks.dataset import TaskDataset

# Larger files are hashed by this many blocks of this size, evenly spread.
BLOCKS, BLOCK_BYTES = 1024, 1 << 16


def describe_data(stage: StageRun) -> dict[str, Any]:
    """Return the settings of a stage that decide which samples it sees in which order, with hashes of files and tasks.

    Raises UserError where a file is missing.
    """
    data, rl = stage.config.data, stage.config.rl
    files: list[dict[str, str]] = []
    if rl is not None:
        files.append({"prefix": rl.prompts, "hash": hash_problems(rl.prompts)})
    for key, source in name_sources(stage.train_key, data.train):
        if source.prefix is not None:
            check_exists(key, source.prefix)
            files.append({"prefix": source.prefix, "hash": hash_file(source.prefix)})
        else:
            files.append({"prefix": str(source), "hash": hash_task(source, data)})
    return {
        "training.seed": stage.config.training.seed,
        "data.sequence_length": data.sequence_length,
        "data.packing": data.packing,
        "data.long_documents": data.long_documents,
        "data.reset_at_documents": data.reset_at_documents,
        "data.validation_share": data.validation_share,
        "stage": stage.number,
        "samples before the stage": stage.first_sample,
        **({} if rl is None else {"rl.group_size": rl.group_size}),
        "weights": [source.weight for source in data.train],
        "files": files,
    }


def hash_task(source: Source, data: DataConfig) -> str:
    """Return a hash of a task's settings and of its first sample, which changes when the code that makes it does."""
    assert source.task is not None
    sample = TaskDataset(source.task, data, [0])[0]
    digest = hashlib.sha256(source.task.model_dump_json().encode())
    for array_E1 in (sample.tokens_E1, sample.labels_E1, sample.counts_E1):
        digest.update(b"" if array_E1 is None else array_E1.tobytes())
    return digest.hexdigest()


def hash_file(prefix: str) -> str:
    """Return a hash of a token file's index, tokens and loss mask.

    Files beyond 64 MiB enter with their size and 1,024 blocks of 64 KiB.
    """
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin", ".mask"):
        path = Path(prefix + suffix)
        if suffix != ".mask" or path.exists():
            add_file(digest, suffix, path)
    return digest.hexdigest()


def add_file(digest: hashlib._Hash, name: str, path: Path) -> None:
    """Add a file to a hash under a name: its size, and its content or, of a large file, blocks of it."""
    size = path.stat().st_size
    digest.update(f"{name} {size}".encode())
    with path.open("rb") as stream:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
            return
        for number in range(BLOCKS):
            stream.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
