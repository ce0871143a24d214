"""The training step with either optimizer; tests/test_faults.py covers values that are not finite."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_sse.data.batch import Batch
from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.model import build_model
from megatron_sse.tools.bench_train_step import PlainLoop
from megatron_sse.training import optimizer
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


def beside_a_plain_loop(folder: Path) -> tuple[list[float], list[float], list[bool]]:
    """Return five losses of a run and of a plain loop, and whether stand-ins were on in backward and in the update."""
    run = start(config := small_run(folder, training={"micro_batch_size": 4}))
    [model] = build_model(config, run.groups, run.device)
    plain, seen, backward_step = PlainLoop(model, config), [], schedules.backward_step
    # Without the stand-ins there is no such device.
    run.trainer.chunks[0].module.output_layer.weight.register_hook(lambda gradient: seen.append(makes_cuda_tensors()))
    adamw = optimizer.adamw
    ours, theirs = (build_data_iterators(run.stage, run.groups, 0)[0] for _ in range(2))
    losses: tuple[list[float], list[float]] = ([], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optimizer, "adamw", lambda *args, **options: (seen.append(makes_cuda_tensors()), adamw(*args, **options))
        )
        for step in range(1, 6):
            losses[0].append(run.advance(step, ours).losses["loss"])
            losses[1].append(plain.step(next(theirs), run.learning_rate(step)))
    # Megatron-Core is as it was for what else this process trains.
    assert makes_cuda_tensors() and schedules.backward_step is backward_step
    return *losses, seen


def makes_cuda_tensors() -> bool:
    try:
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError):
        return False
    return True


def test_a_step_is_that_of_a_plain_loop_and_goes_without_stand_ins(tmp_path: Path) -> None:
    [(ours, plain, seen)] = run_workers(1, beside_a_plain_loop, tmp_path)
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < ours[0]
    # A backward pass and the updates of two groups of parameters in each step.
    assert len(seen) == 5 * 3 and not any(seen)


def made_at_each_forward(folder: Path, forward_only: bool) -> list[int]:
    """Return how many micro-batches are made when the model computes on each of a step's four."""
    run = start(small_run(folder, training={"global_batch_size": 4, "micro_batch_size": 1}))
    training, _ = build_data_iterators(run.stage, run.groups, 0)
    made, at_forward = 0, []

    def counted() -> Iterator[Batch]:
        nonlocal made
        for batch in islice(training, 4):
            made += 1
            yield batch

    run.trainer.chunks[0].register_forward_pre_hook(lambda *unused: at_forward.append(made))
    (run.trainer.validate if forward_only else run.trainer.train_step)(counted())
    return at_forward


@pytest.mark.parametrize("forward_only", [False, True])
def test_one_micro_batch_is_made_ahead(tmp_path: Path, forward_only: bool) -> None:
    small_run(tmp_path)
    assert run_workers(1, made_at_each_forward, tmp_path, forward_only) == [[2, 3, 4, 4]]
