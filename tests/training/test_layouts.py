"""A hybrid trains equally in every layout: losses, and the first step's gradient of every parameter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.training.optimizer import set_learning_rate
from tests.training.support import small_run, start
from tests.workers import run_workers

NUM_STEPS = 8
# One layout has more.
NUM_LONG_STEPS = 25
# Relative differences of losses that are allowed up to a step. Rounding causes at most 1.3e-7 in the first 20 steps.
# Few steps with a narrow tolerance see more than many with a wide one: a rank without weight decay makes 20 times the
# tolerance in 8 steps at 1e-6, and 3 times that in 20 at 1e-5.
TOLERANCES = {NUM_STEPS: 1e-6, NUM_LONG_STEPS: 1e-5}
LONG = {"context": 2, "tensor": 2, "sequence": True, "layout": "zigzag"}
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 64,
    "input_convolution": 3,
    "sse": {"num_heads": 2, "head_dim": 8, "num_partitions": 3, "num_writers": 2, "num_readers": 1},
    "softmax": {"num_heads": 4, "num_kv_heads": 2, "window": 24, "qk_norm": True},
}
DATA = {"sequence_length": 32}
# DEEP has two micro-batches, for pipeline stages or copies of the model. FLAT has one micro-batch and fewer layers,
# which is faster, since the time of so small a model is that of its calls.
DEEP = {"model": MODEL | {"num_layers": 4, "layers": "sse, gdn, sse, softmax"}, "training": {"micro_batch_size": 2}}
FLAT = {"model": MODEL | {"num_layers": 3, "layers": "sse, gdn, softmax"}, "training": {"micro_batch_size": 4}}


class Part:
    """The gradient of one parameter on one rank, and how the parameter is split."""

    def __init__(self, parameter: Any):
        self.gradient = parameter.main_grad.clone()
        self.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
        self.partition_dim = getattr(parameter, "partition_dim", -1)
        self.partition_stride = getattr(parameter, "partition_stride", 1)


def train(folder: Path, sections: dict[str, Any], num_steps: int) -> tuple[list[float], dict[str, Part], int]:
    """Train, and return losses, the first step's gradients by name in the complete model, and the tensor rank."""
    run = start(small_run(folder, data=DATA, **sections))
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    losses, gradients = [], {}
    for step in range(1, num_steps + 1):
        set_learning_rate(run.trainer.optimizer, run.learning_rate(step))
        losses.append(run.trainer.train_step(iterator).losses["loss"])
        if step == 1:
            for chunk in run.trainer.chunks:
                for name, parameter in chunk.module.named_parameters():
                    gradients[global_name(name, chunk.module)] = Part(parameter)
    return losses, gradients, run.groups.tp.rank()


@dataclass(frozen=True)
class OneProcess:
    """Losses of a run of one process, and its first step's gradients."""

    folder: Path
    sections: dict[str, Any]
    losses: list[float]
    gradients: dict[str, torch.Tensor]


def run_one_process(folder: Path, sections: dict[str, Any]) -> OneProcess:
    small_run(folder, data=DATA, **sections)
    [(losses, parts, _)] = run_workers(1, train, folder, sections, NUM_LONG_STEPS)
    # Random tokens: only how often documents end can be learned.
    assert losses[-1] < losses[0] - 0.02
    return OneProcess(folder, sections, losses, {name: part.gradient for name, part in parts.items()})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return run_one_process(tmp_path_factory.mktemp("deep"), DEEP)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return run_one_process(tmp_path_factory.mktemp("flat"), FLAT)


LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2, "sequence": False}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"tensor": 2}),
    (2, {"context": 2}),
    (4, {"context": 4, "layout": "zigzag"}),
    (4, LONG),
    (4, {"context": 2, "pipeline": 2}),
    (4, {"context": 2}),
]


RECOMPUTED = [
    (1, {}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {"context": 2, "layout": "zigzag"}),
    (4, {"context": 2, "tensor": 2}),
]

PARTS: list[tuple[int, dict[str, Any], str | list[str]]] = [
    (1, {}, ["mixer", "mlp"]),
    (2, {"tensor": 2, "sequence": True}, ["mlp", "mixer"]),
    (2, {"context": 2, "layout": "zigzag"}, "mixer"),
]

HAND_OFFS = [
    (2, {"context": 2, "hand_off": "p2p", "layout": "zigzag"}),
    (4, {"context": 4, "hand_off": "allgather"}),
    (4, {"context": 4, "hand_off": "two_level", "context_per_node": 2}),
]


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_like_one_process(world_size: int, parallel: dict[str, Any], deep: OneProcess, flat: OneProcess) -> None:
    compare(world_size, parallel, "none", deep, flat)


@pytest.mark.parametrize(("world_size", "parallel"), RECOMPUTED, ids=str)
def test_recomputed_like_one_process(
    world_size: int, parallel: dict[str, Any], deep: OneProcess, flat: OneProcess
) -> None:
    compare(world_size, parallel, "full", deep, flat, NUM_STEPS)


@pytest.mark.parametrize(("world_size", "parallel", "recompute"), PARTS, ids=str)
def test_with_parts_recomputed_like_one_process(
    world_size: int, parallel: dict[str, Any], recompute: str | list[str], deep: OneProcess, flat: OneProcess
) -> None:
    compare(world_size, parallel, recompute, deep, flat, num_steps=3)


@pytest.mark.parametrize(("world_size", "parallel"), HAND_OFFS, ids=str)
def test_hand_offs_like_one_process(
    world_size: int, parallel: dict[str, Any], deep: OneProcess, flat: OneProcess
) -> None:
    compare(world_size, parallel, "none", deep, flat, NUM_STEPS)


def test_eight_processes_like_one(deep: OneProcess, flat: OneProcess) -> None:
    compare(8, {"context": 2, "tensor": 2, "pipeline": 2}, "none", deep, flat)


def compare(
    world_size: int,
    parallel: dict[str, Any],
    recompute: str | list[str],
    deep: OneProcess,
    flat: OneProcess,
    num_steps: int | None = None,
) -> None:
    """Train in a layout and compare losses and gradients with those of one process."""
    tensor_size = parallel.get("tensor", 1)
    expected = flat if 1 < world_size == tensor_size * parallel.get("context", 1) else deep
    training = expected.sections["training"] | {"recompute": recompute}
    sections = expected.sections | {"parallel": parallel, "training": training}
    seen = set()
    if num_steps is None:
        num_steps = NUM_LONG_STEPS if parallel == LONG else NUM_STEPS
    for losses, parts, tensor_rank in run_workers(world_size, train, expected.folder, sections, num_steps):
        assert len(losses) == num_steps
        for last, tolerance in TOLERANCES.items():
            assert losses[:last] == pytest.approx(expected.losses[: min(last, num_steps)], rel=tolerance)
        for name, part in parts.items():
            whole = expected.gradients[name]
            error = (part.gradient - own_part(whole, part, tensor_rank, tensor_size)).norm() / whole.norm()
            assert error < 1e-5, f"{name}: {error:.1e}"
            seen.add(name)
    assert seen == set(expected.gradients)
