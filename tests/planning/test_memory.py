"""Planned memory against a real step on the CPU: within 10 %, weights and gradients exactly."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_sse.data.batch import make_batch
from megatron_sse.data.dataset import Sample
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.parallel.groups import destroy_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.planning.memory import kept_of_step, rank_memory, table_bytes
from megatron_sse.planning.sizes import Sizes
from megatron_sse.training.loop import Run
from tests.kernels.test_segments import keep_unused_chunks
from tests.planning.live import LiveBytes
from tests.training.support import small_run, start
from tests.workers import run_workers

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "vocab_size": 500,
    "layers": "sse, gdn, sse, softmax",
    "sse": {"num_heads": 4, "head_dim": 16, "value_head_dim": 24, "num_partitions": 4, "num_readers": 2},
    "softmax": {"num_heads": 4, "num_kv_heads": 2},
}
DELTA = MODEL | {"sse": MODEL["sse"] | {"recurrence": "gdn", "num_value_heads": 8, "form": "mask"}}
KDA = MODEL | {"layers": "sse, kda", "sse": MODEL["sse"] | {"recurrence": "kda", "num_value_heads": 8}}
PLAIN = MODEL | {"layers": "gla", "sse": MODEL["sse"] | {"short_convolution": 4, "output_gate": False}}
PLAIN |= {"input_convolution": 4}
NORMED = MODEL | {"layers": "softmax", "softmax": MODEL["softmax"] | {"qk_norm": True, "rotary_base": 0.0}}
TOP_KEYS = MODEL | {"layers": "sse", "sse": MODEL["sse"] | {"key_map": "silu", "query_map": "softmax"}}
LENGTH = 512


class KeptTensors(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that count the bytes of storages that autograd keeps, each once and without parameters."""

    def __init__(self, parameters: Any) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, torch.Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.storages[pointer] = tensor
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


class Measured(NamedTuple):
    """Bytes of a rank. kept: by a forward pass. peak: the most of a step's forward and backward passes."""

    kept: int
    weights: int
    gradients: int
    optimizer: int
    peak: int


def measure(folder: Path, runs: list[dict[str, Any]]) -> list[Measured]:
    """Return what this rank holds in each run, with the chunks that only a GPU has: `plan` counts them."""
    with pytest.MonkeyPatch.context() as patch:
        keep_unused_chunks(patch)
        return [measure_run(folder, sections) for sections in runs]


def measure_run(folder: Path, sections: dict[str, Any]) -> Measured:
    """Return what this rank holds in a run."""
    run = start(small_run(folder, **sections))
    weights, gradients = held(run)
    kept = kept_by_pass(run)
    batches, _ = build_data_iterators(run.stage, run.groups, 0)
    run.trainer.measures_health = False
    live, schedule = LiveBytes(), run.trainer._run_schedule

    def run_schedule(*args: Any, live: LiveBytes = live, schedule: Any = schedule, **options: Any) -> Any:
        with live:
            return schedule(*args, **options)

    run.trainer._run_schedule = run_schedule  # type: ignore[method-assign]
    run.trainer.train_step(batches)
    found = Measured(kept, weights, gradients, optimizer_bytes(run), live.peak)
    destroy_groups()
    return found


def kept_by_pass(run: Run) -> int:
    """Return the bytes kept of one micro-batch in which every sequence is one document."""
    training, length = run.config.training, run.config.data.sequence_length
    shard = ContextShard(run.groups.cp.rank(), run.groups.cp.size())
    layout = TokenLayout.from_starts(np.zeros((training.micro_batch_size, length), dtype=bool), shard=shard)
    layout.layer_loss_scale = torch.ones(())
    tokens_BL = torch.arange(training.micro_batch_size * layout.length).view(training.micro_batch_size, -1) % 7
    [chunk] = run.trainer.chunks
    kept = KeptTensors(chunk.parameters())
    with kept:
        chunk(tokens_BL, None, None, labels=tokens_BL, packed_seq_params=layout)
    return kept.nbytes


def held(run: Run) -> tuple[int, int]:
    """Return the bytes of weights and of DDP's gradients."""
    [chunk] = run.trainer.chunks
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in chunk.parameters()}
    return sum(weights.values()), sum(buffer.grad_data.nbytes for buffer in chunk.buffers)


def optimizer_bytes(run: Run) -> int:
    """Return the bytes of moments and fp32 copies."""
    [chunk] = run.trainer.chunks
    known = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    state: dict[int, int] = {}
    for part in getattr(run.trainer.optimizer, "chained_optimizers", [run.trainer.optimizer]):
        for parameter, values in part.optimizer.state.items():
            for tensor in (parameter, *values.values()):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    state[storage.data_ptr()] = storage.nbytes()
    return sum(state.values())


# Number of processes, layout, model, training.
RUNS: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (1, {}, MODEL, {}),
    (1, {}, MODEL, {"precision": "bf16", "micro_batch_size": 2}),
    (1, {}, DELTA, {}),
    (1, {}, DELTA, {"precision": "bf16"}),
    (1, {}, KDA, {}),
    (1, {}, KDA, {"precision": "bf16"}),
    (1, {}, PLAIN, {}),
    (1, {}, NORMED, {}),
    (1, {}, NORMED, {"fused_swiglu": True}),
    (1, {}, NORMED, {"precision": "bf16"}),
    (1, {}, TOP_KEYS, {"precision": "bf16"}),
    (1, {}, MODEL, {"recompute": "full"}),
    (1, {}, MODEL, {"recompute": "mixer"}),
    (1, {}, MODEL, {"recompute": "mlp", "precision": "bf16"}),
    (1, {}, MODEL, {"recompute": ["mixer", "mlp"]}),
    (2, {"tensor": 2, "sequence": False}, MODEL, {}),
    (2, {"tensor": 2, "sequence": True}, MODEL, {"precision": "bf16"}),
    (2, {"context": 2}, MODEL, {}),
    (2, {"context": 2}, KDA, {}),
    (2, {"distributed_optimizer": True}, MODEL, {}),
]


@pytest.mark.parametrize("size", [1, 2])
def test_memory_is_that_of_a_real_step(size: int, tmp_path: Path) -> None:
    data = {"sequence_length": LENGTH, "reset_at_documents": False}
    runs = [
        {"model": model, "parallel": parallel, "training": {"global_batch_size": 2} | training, "data": data}
        for world_size, parallel, model, training in RUNS
        if world_size == size
    ]
    for found in run_workers(size, measure, tmp_path, runs):
        for number, (sections, measured) in enumerate(zip(runs, found, strict=True)):
            config = small_run(tmp_path, **sections)
            sizes = Sizes(config, size // config.parallel.replica_size, kernels="torch")
            planned = rank_memory(sizes, 0)
            held = planned.weights + planned.gradients
            assert (planned.weights, planned.gradients) == (measured.weights, measured.gradients), number
            assert planned.optimizer == pytest.approx(measured.optimizer, rel=0.1), number
            assert sum(kept_of_step(sizes, 0)) == pytest.approx(measured.kept, rel=0.1), number
            # No step here reports the layers' health.
            peak = planned.total - held - planned.optimizer - planned.metrics
            assert peak == pytest.approx(measured.peak, rel=0.08), number


@pytest.mark.parametrize(("batch_size", "documents"), [(1, 1), (2, 3)])
def test_tables_are_those_of_a_batch(tmp_path: Path, batch_size: int, documents: int) -> None:
    training = {"micro_batch_size": batch_size, "global_batch_size": batch_size}
    config = small_run(tmp_path, training=training, data={"sequence_length": LENGTH})
    starts_E1 = np.zeros(LENGTH + 1, dtype=bool)
    starts_E1[:: LENGTH // documents + 1] = True
    everywhere_E1 = np.ones(LENGTH + 1, dtype=bool)
    sample = Sample(np.zeros(LENGTH + 1, dtype=np.int64), starts_E1, everywhere_E1, LENGTH + 1)
    batch = make_batch([sample] * batch_size, reset_at_documents=True)
    tensors = [value for part in (batch, batch.layout) for value in vars(part).values() if torch.is_tensor(value)]
    assert batch.layout.num_documents == batch_size * documents
    assert table_bytes(Sizes(config, 1, documents=documents)) == sum(tensor.nbytes for tensor in tensors)
