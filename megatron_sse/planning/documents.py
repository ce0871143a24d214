"""How many documents a sequence holds, from the token files where they are there."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_sse.config import RunConfig
from megatron_sse.data.checks import read_index


def count_documents(config: RunConfig, given: int | None) -> int:
    """Return the mean number of documents of a training sequence, rounded up: as given, else as in the token files.

    It is 1 where documents do not reset the states, and where not all of data.train are token files that exist; also
    with rl, but for rl.share_prefixes: then as many as fit if each answer has rl.max_new_tokens. Raises UserError where
    an index cannot be read.
    """
    if not config.data.reset_at_documents:
        return 1
    if given is not None:
        return given
    if config.rl is not None and config.rl.share_prefixes:
        return max(1, config.data.sequence_length // config.rl.max_new_tokens)
    files = [(source.prefix, source.weight) for source in config.data.train if source.prefix is not None]
    if (
        not files
        or len(files) < len(config.data.train)
        or not all(Path(prefix + ".idx").is_file() for prefix, _ in files)
    ):
        return 1
    total = sum(weight for _, weight in files)
    mean = sum(weight * _per_sequence(prefix, config.data.sequence_length) for prefix, weight in files) / total
    return max(1, math.ceil(mean))


def _per_sequence(prefix: str, length: int) -> float:
    index = read_index(Path(prefix + ".idx"))
    documents = len(index.offsets_D1) - 1
    return documents * length / max(1, index.num_tokens)
