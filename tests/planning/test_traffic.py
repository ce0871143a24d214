"""Planned bytes of a step equal those that a real step sends, over every axis and on every rank."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sse.planning.sizes import Sizes
from megatron_sse.planning.traffic import step_traffic
from tests.planning.counted import count_step
from tests.training.support import small_run
from tests.workers import run_workers

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 96,
    "vocab_size": 64,
    "vocab_multiple": 1,
    "layers": "sse, gdn, sse, softmax",
    "sse": {"num_heads": 2, "head_dim": 8, "value_head_dim": 12, "num_partitions": 3, "num_writers": 2},
    "softmax": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
}
CONVOLUTION = MODEL | {"sse": MODEL["sse"] | {"short_convolution": 3, "num_value_heads": 4}, "input_convolution": 4}
DELTA = MODEL | {"layers": "sse", "sse": MODEL["sse"] | {"recurrence": "gdn", "own_read_router": True}}
SHARED_KEYS = MODEL | {"softmax": MODEL["softmax"] | {"num_kv_heads": 1, "qk_norm": False}, "tie_embeddings": True}
FULL = {"recompute": "full"}
BOTH = {"recompute": ["mixer", "mlp"]}
BF16 = {"precision": "bf16"}

# Number of processes, layout, model, training.
RUNS: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (2, {"tensor": 2, "sequence": False}, MODEL, {"recompute": "mlp"}),
    (2, {"tensor": 2, "sequence": True}, DELTA, {}),
    (2, {"tensor": 2, "sequence": False}, SHARED_KEYS, FULL),
    (2, {"tensor": 2, "sequence": True}, CONVOLUTION, BF16 | FULL),
    (2, {"pipeline": 2}, SHARED_KEYS, {}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}, MODEL, BF16),
    (2, {"context": 2}, CONVOLUTION, {"recompute": "mixer"}),
    (2, {"context": 2, "hand_off": "p2p", "layout": "zigzag"}, DELTA, {}),
    (2, {"context": 2, "hand_off_wire": "bf16"}, MODEL | {"layers": "gla"}, FULL),
    (2, {}, MODEL, {}),
    (2, {"distributed_optimizer": True}, MODEL, {}),
    (2, {}, MODEL, BF16),
    (4, {"context": 4, "hand_off": "allgather", "distributed_optimizer": True}, MODEL, {}),
    (4, {"context": 2, "tensor": 2, "sequence": True, "layout": "zigzag"}, CONVOLUTION, BF16 | BOTH),
    (4, {"context": 2, "pipeline": 2}, MODEL, FULL),
    (4, {"context": 4, "hand_off": "two_level", "context_per_node": 2}, MODEL, {}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}, SHARED_KEYS, BF16),
]


@pytest.mark.parametrize(("size", "parallel", "model", "training"), RUNS, ids=range(len(RUNS)))
def test_bytes_are_those_of_a_real_step(
    size: int, parallel: dict[str, Any], model: dict[str, Any], training: dict[str, Any], tmp_path: Path
) -> None:
    sections = {"model": model, "parallel": parallel, "training": training, "data": {"sequence_length": 32}}
    config = small_run(tmp_path, **sections)
    sizes = Sizes(config, size // config.parallel.replica_size, kernels="torch")
    for counted, stage, context_rank in run_workers(size, count_step, tmp_path, sections):
        assert step_traffic(sizes, stage, context_rank) == counted
