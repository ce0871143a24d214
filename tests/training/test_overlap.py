"""Overlapped communication and fused operations change how a step is computed, not what."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sse.checkpoint.folders import checkpoint_folder, step_folder
from megatron_sse.checkpoint.full_weights import read_weights
from megatron_sse.config import (
    describe_speedups,
    fuses_loss,
    overlaps_gradients,
    overlaps_parameters,
    transformer_settings,
)
from megatron_sse.training import step
from tests.checkpoint.support import Trace, save, take_steps
from tests.training.support import small_run, start
from tests.workers import run_workers

STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "copies": {},
    "two micro-batches, recomputed": {"training": {"recompute": "full", "global_batch_size": 8}},
    "bf16": {"training": {"precision": "bf16"}},
}


def train_and_save(folder: Path, sections: dict[str, Any], overlap: bool) -> tuple[Trace, int]:
    """Train and save with gathering of weights under way; return losses and norms, and the number of DDP's buckets."""
    parallel = {"distributed_optimizer": True, "overlap_gradients": overlap, "overlap_parameters": overlap}
    monitor = {"folder": str(folder / f"run_{overlap}")}
    run = start(small_run(folder, **sections, parallel=parallel, monitor=monitor))
    run.saver.start_stage(run.stage, {})
    [chunk] = run.trainer.chunks
    assert chunk.ddp_config.overlap_grad_reduce == chunk.ddp_config.overlap_param_gather == overlap
    trace = take_steps(run, STEPS)
    save(run, STEPS)
    return trace, len(chunk.bucket_groups)


def train_in_buckets(folder: Path, bucket_size: int) -> tuple[Trace, int]:
    """Train with overlap in buckets of about `bucket_size` weights; return losses and norms, and their number."""
    parallel = {"distributed_optimizer": True, "overlap_gradients": True, "overlap_parameters": True}
    original = step.DistributedDataParallelConfig
    step.DistributedDataParallelConfig = partial(original, bucket_size=bucket_size)  # type: ignore[misc]
    try:
        run = start(small_run(folder, parallel=parallel))
    finally:
        step.DistributedDataParallelConfig = original  # type: ignore[misc]
    [chunk] = run.trainer.chunks
    return take_steps(run, STEPS), len(chunk.bucket_groups)


def test_weights_that_another_module_multiplies_have_arrived(tmp_path: Path) -> None:
    """The output layer's weight and the first matrices of low-rank pairs are read outside their modules' calls."""
    small_run(tmp_path)
    (expected, _), _ = run_workers(2, train_and_save, tmp_path, {}, False)
    for bucket_size in (8000, 1500):
        for found, num_buckets in run_workers(2, train_in_buckets, tmp_path, bucket_size):
            assert num_buckets > 5
            for (losses, norm), (expected_losses, expected_norm) in zip(found, expected, strict=True):
                # Weights of the step before make a difference of 1e-6; the norm is summed in another order.
                assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-7)
                assert norm == pytest.approx(expected_norm, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_losses_norms_and_checkpoint(tmp_path: Path, layout: str) -> None:
    sections = LAYOUTS[layout]
    small_run(tmp_path, **sections)
    (expected, _), _ = run_workers(2, train_and_save, tmp_path, sections, False)
    for found, _ in run_workers(2, train_and_save, tmp_path, sections, True):
        assert found == expected
    configs = (small_run(tmp_path, monitor={"folder": str(tmp_path / f"run_{overlap}")}) for overlap in (False, True))
    plain, overlapped = (read_weights(step_folder(checkpoint_folder(config), STEPS)) for config in configs)
    assert set(plain.keys()) == set(overlapped.keys())
    assert all(torch.equal(plain.get(name), overlapped.get(name)) for name in plain.keys())


def train_fused(folder: Path, fused: bool) -> Trace:
    training = {"precision": "bf16", "fused_loss": fused, "fused_swiglu": fused}
    # Megatron-Core's fusions are torch.compile's; uncompiled they compute the same.
    with torch._dynamo.config.patch(disable=True):
        return take_steps(start(small_run(folder, training=training)), STEPS)


def test_fused_operations_train_alike(tmp_path: Path) -> None:
    small_run(tmp_path)
    [expected], [found] = (run_workers(1, train_fused, tmp_path, fused) for fused in (False, True))
    for (losses, norm), (expected_losses, expected_norm) in zip(found, expected, strict=True):
        assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-3)
        assert norm == pytest.approx(expected_norm, rel=2e-2)


@pytest.mark.parametrize(
    ("sections", "on_gpu", "expected"),
    [
        ({"training": {"precision": "bf16"}}, True, (True, True, True, True)),
        ({"training": {"precision": "bf16"}}, False, (False, False, False, False)),
        ({}, True, (True, True, True, False)),
        ({"parallel": {"distributed_optimizer": True}}, True, (True, True, True, True)),
        ({"parallel": {"distributed_optimizer": True, "overlap_gradients": False}}, True, (True, True, False, False)),
        ({"parallel": {"distributed_optimizer": True, "overlap_parameters": False}}, True, (True, True, True, False)),
        ({"training": {"precision": "bf16", "fused_loss": False}}, True, (False, True, True, True)),
        ({"training": {"fused_swiglu": True}}, False, (False, True, False, False)),
    ],
    ids=str,
)
def test_defaults(tmp_path: Path, sections: dict[str, Any], on_gpu: bool, expected: tuple[bool, ...]) -> None:
    config = small_run(tmp_path, **sections)
    settings = transformer_settings(config, on_gpu)
    fused = fuses_loss(config, on_gpu), settings["bias_activation_fusion"]
    assert (*fused, overlaps_gradients(config, on_gpu), overlaps_parameters(config, on_gpu)) == expected
    # The line at the start of a run names the same.
    names = [("fused", "cross entropy"), ("fused", "SwiGLU"), ("overlapped", "gradients"), ("overlapped", "weights")]
    line = dict(part.split(": ") for part in describe_speedups(config, on_gpu, copies=2).split("; "))
    assert tuple(name in line[kind] for kind, name in names) == expected
    assert "overlapped: nothing" in describe_speedups(config, on_gpu, copies=1)
