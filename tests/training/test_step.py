"""The training step: the same in every layout, mean over real tokens, and no step where something is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.training.loop import NonFiniteError, Run
from megatron_sse.training.optimizer import set_learning_rate
from tests.training.support import small_run, start
from tests.workers import run_workers


def batches_of(run: Run) -> list[Batch]:
    """This rank's micro-batches of one step."""
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    return [next(iterator) for _ in range(run.trainer.num_micro_batches)]


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.trainer.chunks for parameter in chunk.parameters()]


def train_steps(folder: Path, distributed_optimizer: bool) -> list[tuple[dict[str, float], float]]:
    """Losses and gradient norm of five steps."""
    run = start(small_run(folder, parallel={"distributed_optimizer": distributed_optimizer}))
    iterator, _ = build_data_iterators(run.stage, run.groups, 0)
    results = []
    for step in range(1, 6):
        set_learning_rate(run.trainer.optimizer, run.learning_rate(step))
        result = run.trainer.train_step(iterator)
        results.append((result.losses, result.grad_norm))
    return results


def test_the_distributed_optimizer_steps_like_the_plain_one(tmp_path: Path) -> None:
    small_run(tmp_path)
    [expected] = run_workers(1, train_steps, tmp_path, False)
    assert expected[-1][0]["loss"] < expected[0][0]["loss"] and expected[0][0]["balance_loss"] >= 0.99
    for result in run_workers(2, train_steps, tmp_path, True):
        for (losses, norm), (expected_losses, expected_norm) in zip(result, expected, strict=True):
            assert losses == pytest.approx(expected_losses, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


def masked_step(folder: Path, masked_ranks: list[int]) -> tuple[float, float]:
    """Loss and gradient norm where the micro-batches of some ranks of two count no token at all."""
    run = start(small_run(folder))
    batches = batches_of(run)
    # With one process, the micro-batches that the other layout gives to the masked ranks.
    for number, batch in enumerate(batches):
        rank = dist.get_rank() if dist.get_world_size() == 2 else number % 2
        if rank in masked_ranks:
            batch.loss_mask_BL.zero_()
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def test_a_rank_with_only_masked_tokens_changes_nothing(tmp_path: Path) -> None:
    small_run(tmp_path)
    [(loss, norm)] = run_workers(1, masked_step, tmp_path, [1])
    for result in run_workers(2, masked_step, tmp_path, [1]):
        assert result == pytest.approx((loss, norm), rel=1e-5)


def masked_half_step(folder: Path, context: int) -> tuple[float, float]:
    """Loss and gradient norm where the second half of every sequence, rank 1's part of two, counts no token."""
    run = start(small_run(folder, parallel={"context": context}))
    batches = batches_of(run)
    for batch in batches:
        half = batch.layout.column_L >= run.config.data.sequence_length // 2
        batch.loss_mask_BL[:, half] = 0
    result = run.trainer.train_step(iter(batches))
    return result.losses["loss"], result.grad_norm


def test_a_context_rank_with_only_masked_tokens_changes_nothing(tmp_path: Path) -> None:
    small_run(tmp_path)
    [expected] = run_workers(1, masked_half_step, tmp_path, 1)
    for result in run_workers(2, masked_half_step, tmp_path, 2):
        assert result == pytest.approx(expected, rel=1e-5)


def poisoned_step(folder: Path, sections: dict[str, Any], where: str) -> tuple[bool, bool, bool]:
    """Spoil something on rank 1; whether the step was skipped, weights stayed, and the next clean step moved them."""
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


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"parallel": {"distributed_optimizer": True}},
        {"parallel": {"pipeline": 2}},
        {"parallel": {"tensor": 2}},
    ],
    ids=str,
)
def test_something_not_finite_on_one_rank_skips_the_step_on_all(
    tmp_path: Path, sections: dict[str, Any], where: str
) -> None:
    small_run(tmp_path)
    assert run_workers(2, poisoned_step, tmp_path, sections, where) == [(True, True, True)] * 2


def steps_until_stopped(folder: Path) -> tuple[int, str]:
    run = start(small_run(folder, training={"max_skipped_steps": 3}))
    bad = batches_of(run)
    bad[0].loss_mask_BL[0, 0] = float("nan")
    good = batches_of(run)
    # Two bad steps, a good one, and from then on only bad ones.
    for step, batches in enumerate([bad, bad, good, *[bad] * 9], start=1):
        try:
            run._report(step, run.trainer.train_step(iter(batches)), 1e-3, 1.0)
        except NonFiniteError as error:
            return step, str(error)
    return 0, "never stopped"


def test_the_run_stops_after_too_many_skipped_steps_in_a_row(tmp_path: Path) -> None:
    [(step, message)] = run_workers(1, steps_until_stopped, tmp_path)
    assert step == 6
    assert "training.max_skipped_steps" in message and "3 steps in a row" in message
