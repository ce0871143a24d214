"""Numeric faults on some ranks and their required outcomes (F19, F21, F22 of test_faults.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sse.config import load_config
from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.training.loop import NonFiniteError, Run
from megatron_sse.training.optimizer import set_learning_rate
from tests.check_parallel import broken
from tests.training.support import small_run, start
from tests.workers import run_workers

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
DISTRIBUTED: dict[str, Any] = {"parallel": {"distributed_optimizer": True}}
PIPELINE: dict[str, Any] = {"parallel": {"pipeline": 2}}
TENSOR: dict[str, Any] = {"parallel": {"tensor": 2}}


def batches_of(run: Run) -> list[Batch]:
    """Return this rank's micro-batches of one step."""
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    return [next(iterator) for _ in range(run.trainer.num_micro_batches)]


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.trainer.chunks for parameter in chunk.parameters()]


def poisoned_step(folder: Path, sections: dict[str, Any], where: str) -> tuple[bool, bool, bool]:
    """Put a fault on rank 1; return whether the step was skipped, weights stayed, and the next step moved them."""
    run = start(small_run(folder, **sections))
    set_learning_rate(run.trainer.optimizer, 1e-2)
    before = weights(run)
    batches = batches_of(run)
    if dist.get_rank() == 1 and where == "loss":
        batches[0].loss_mask_BL[0, 0] = float("nan")
    handle = None
    if dist.get_rank() == 1 and where == "gradient":
        parameter = next(run.trainer.chunks[0].parameters())
        handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    skipped = run.trainer.train_step(iter(batches)).skipped
    stayed = all(torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    if handle is not None:
        handle.remove()
    clean = run.trainer.train_step(iter(batches_of(run)))
    moved = all(not torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    return skipped, stayed, moved and not clean.skipped


def skipped_on_all_ranks(sections: dict[str, Any], where: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a value that is not finite on rank 1 makes all ranks skip the step, and that the next one is taken."""
    small_run(folder)
    assert run_workers(2, poisoned_step, folder, sections, where) == [(True, True, True)] * 2


def steps_until_stopped(folder: Path) -> tuple[int, str]:
    run = start(small_run(folder, training={"max_skipped_steps": 3}))
    bad = batches_of(run)
    bad[0].loss_mask_BL[0, 0] = float("nan")
    good = batches_of(run)
    # Two bad steps are followed by a good one and then by bad ones only.
    for step, batches in enumerate([bad, bad, good, *[bad] * 9], start=1):
        try:
            run._report(step, run.trainer.train_step(iter(batches)), 1e-3, 1.0)
        except NonFiniteError as error:
            return step, str(error)
    return 0, "never stopped"


def stopped_after_too_many(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [(step, message)] = run_workers(1, steps_until_stopped, folder)
    assert step == 6
    assert "training.max_skipped_steps" in message and "3 steps in a row" in message


def masked_step(folder: Path, masked_ranks: list[int]) -> tuple[float, float]:
    """Return loss and gradient norm where all tokens of some of the two ranks are masked."""
    run = start(small_run(folder))
    batches = batches_of(run)
    # One process masks the micro-batches that the two-rank layout gives to the masked ranks.
    for number, batch in enumerate(batches):
        rank = dist.get_rank() if dist.get_world_size() == 2 else number % 2
        if rank in masked_ranks:
            batch.loss_mask_BL.zero_()
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def masked_data_rank(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a masked data-parallel rank gives the loss and gradient norm of one process, which are finite."""
    small_run(folder)
    [(loss, norm)] = run_workers(1, masked_step, folder, [1])
    for result in run_workers(2, masked_step, folder, [1]):
        assert result == pytest.approx((loss, norm), rel=1e-5)


def masked_half_step(folder: Path, context: int) -> tuple[float, float]:
    """Return loss and gradient norm where the second half of every sequence, held by rank 1, is masked."""
    run = start(small_run(folder, parallel={"context": context}))
    batches = batches_of(run)
    for batch in batches:
        half = batch.layout.column_L >= run.config.data.sequence_length // 2
        batch.loss_mask_BL[:, half] = 0
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def masked_context_rank(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_run(folder)
    [expected] = run_workers(1, masked_half_step, folder, 1)
    for result in run_workers(2, masked_half_step, folder, 2):
        assert result == pytest.approx(expected, rel=1e-5)


def broken_hand_off_seen(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that check-parallel reports a broken hand-off, only in the layout that uses it, from the first layer on."""
    config = load_config(QUICKSTART, ["model.layers=sse, softmax", "model.num_layers=2"])
    path = folder / "numbers.json"
    assert broken.check_broken(config, ["cp2", "dp2"], path, broken.hand_off_disabled) == 1
    numbers = json.loads(path.read_text())
    layouts, allowed = numbers["layouts"], numbers["allowed"]
    assert layouts["dp2"]["verdict"] == "same" and layouts["cp2"]["verdict"] == "different"
    errors = layouts["cp2"]["errors"]
    assert errors["output of embedding"] <= allowed["output of embedding"]
    assert errors["output of layer 1"] > max(1e-3, allowed["output of layer 1"])
