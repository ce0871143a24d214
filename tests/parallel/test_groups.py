"""Megatron-Core on gloo: every layout gives the losses and the gradients of one process."""

import glob
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sse.parallel.groups import init_groups
from tests.parallel.plain_gpt import Layout, train
from tests.workers import WorkerError, run_workers

NUM_STEPS = 4


@pytest.fixture(scope="module")
def one_process() -> tuple[list[float], dict[str, torch.Tensor]]:
    [result] = run_workers(1, train, Layout(), NUM_STEPS)
    losses, _ = result
    assert losses[-1] != losses[0]
    return result


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(pipeline=2),
        Layout(pipeline=2, virtual_pipeline=2),
        Layout(),
        Layout(distributed_optimizer=True),
        Layout(tensor=2, recompute=True),
        Layout(pipeline=2, virtual_pipeline=2, recompute=True),
    ],
    ids=str,
)
def test_two_processes_train_like_one(layout: Layout, one_process: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    expected_losses, expected_gradients = one_process
    results = run_workers(2, train, layout, NUM_STEPS)
    seen = set()
    for losses, gradients in results:
        if losses:
            assert losses == pytest.approx(expected_losses, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
            seen.add(name)
    assert seen == set(expected_gradients)
    assert any(losses for losses, _ in results)


def group_ranks(tensor: int, pipeline: int) -> dict[str, list[int]]:
    groups = init_groups(tensor, pipeline)
    return {name: dist.get_process_group_ranks(getattr(groups, name)) for name in ("tp", "pp", "dp", "mp")}


def test_neighbouring_ranks_share_a_tensor_group() -> None:
    by_rank = run_workers(4, group_ranks, 2, 2)
    assert [groups["tp"] for groups in by_rank] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [groups["pp"] for groups in by_rank] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    by_rank = run_workers(4, group_ranks, 1, 2)
    assert [groups["dp"] for groups in by_rank] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_groups_can_be_made_again_after_they_were_destroyed() -> None:
    assert run_workers(2, group_ranks, 2, 1)[0]["tp"] == [0, 1]
    assert run_workers(2, group_ranks, 1, 1)[0]["tp"] == [0]


def test_a_world_that_does_not_divide_is_an_error_on_every_rank() -> None:
    with pytest.raises(WorkerError, match="AssertionError"):
        run_workers(2, group_ranks, 2, 2)


def gloo_threads() -> int:
    """Return the number of threads that wait for data once a layout's groups have been used."""
    init_groups(tensor=2)
    value = torch.ones(1)
    for group in [*dist.distributed_c10d._world.pg_map]:
        dist.all_reduce(value, group=group)
    names = [Path(path).read_text() for path in glob.glob("/proc/self/task/*/comm")]
    return sum(name.startswith("gloo") for name in names)


def test_all_groups_share_one_gloo_thread() -> None:
    assert run_workers(2, gloo_threads) == [1, 1]
