"""What a run's order of samples follows from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_sse.config import StageRun

# Of larger files this many blocks of this size, evenly spread.
BLOCKS, BLOCK_BYTES = 1024, 1 << 16


def describe_data(stage: StageRun) -> dict[str, Any]:
    """The settings of a stage that decide which samples it sees and in which order, and the contents of its files."""
    data = stage.config.data
    return {
        "training.seed": stage.config.training.seed,
        "data.sequence_length": data.sequence_length,
        "data.packing": data.packing,
        "data.long_documents": data.long_documents,
        "data.reset_at_documents": data.reset_at_documents,
        "data.validation_share": data.validation_share,
        "stage": stage.number,
        "samples before the stage": stage.first_sample,
        "weights": [source.weight for source in data.train],
        "files": [{"prefix": source.prefix, "hash": hash_file(source.prefix)} for source in data.train],
    }


def hash_file(prefix: str) -> str:
    """Of a token file's index, tokens and loss mask; of files beyond 64 MiB the size and 1,024 blocks of 64 KiB."""
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin", ".mask"):
        path = Path(prefix + suffix)
        if suffix == ".mask" and not path.exists():
            continue
        size = path.stat().st_size
        digest.update(f"{suffix} {size}".encode())
        with path.open("rb") as stream:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for number in range(BLOCKS):
                stream.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
