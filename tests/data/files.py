"""Token files and configurations for tests."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.config import RunConfig

END = 63


def write_tokens(prefix: str, documents: list[list[int]], dtype: type = np.uint16) -> None:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")


def random_documents(num_documents: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Return random documents of 1 to `longest` tokens, each ending with END."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, num_documents)
    return [[*generator.integers(0, END, length).tolist(), END] for length in lengths]


def data_parallel_groups(
    rank: int = 0, size: int = 1, context_rank: int = 0, context_size: int = 1
) -> ProcessGroupCollection:
    """Return stand-ins for a rank's data-parallel and context groups, with what the data code reads of them."""
    sizes = ((rank, size), (context_rank, context_size))
    data, context = (SimpleNamespace(rank=lambda r=r: r, size=lambda n=n: n) for r, n in sizes)
    return SimpleNamespace(dp=data, cp=context)  # type: ignore[return-value]


def run_config(train: str, **sections: dict[str, Any]) -> RunConfig:
    """Return a small run on `train`, with other settings by section."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "vocab_size": 64,
            "layers": "sse, softmax",
            "sse": {"num_heads": 2, "head_dim": 16},
            "softmax": {"num_heads": 2},
        },
        "data": {"train": train, "sequence_length": 16},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5},
        "optimizer": {"learning_rate": 1e-3},
        "monitor": {"folder": train + "_run"},
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return RunConfig.model_validate(values)
