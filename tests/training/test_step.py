"""The training step with either optimizer; tests/test_faults.py covers values that are not finite."""

from pathlib import Path

import pytest

from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.training.optimizer import set_learning_rate
from tests.training.support import small_run, start
from tests.workers import run_workers


def train_steps(folder: Path, distributed_optimizer: bool) -> list[tuple[dict[str, float], float]]:
    """Return losses and gradient norms of five steps."""
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
