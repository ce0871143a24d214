"""The pool of gloo workers that other tests use: results by rank, failures that name the rank, no hangs."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_sse.parallel.groups import init_groups
from tests.workers import WorkerError, run_workers

ROOT = Path(__file__).parents[2]


def rank_and_sum(value: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + value)])
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("broken on purpose")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def process_id() -> int:
    return os.getpid()


def make_groups() -> None:
    init_groups(context=2)
    kept = [dist.new_group([0, 1])]
    kept.append(kept)  # type: ignore[arg-type]


def num_groups_and_threads() -> tuple[int, int]:
    return len(dist.distributed_c10d._world.pg_map), psutil.Process().num_threads()


def devices() -> tuple[str | None, int, str]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count(), dist.get_backend()


def test_workers_see_no_gpu_unless_they_are_told_to_use_one() -> None:
    assert run_workers(1, devices) == [("", 0, "gloo")]
    if torch.cuda.is_available():
        [(_, count, backend)] = run_workers(1, devices, gpus=True)
        assert (count > 0, backend) == (True, "nccl")
    else:
        with pytest.raises(WorkerError, match="rank 0 died"):
            run_workers(1, devices, gpus=True)


@pytest.mark.parametrize(("gpu", "interpreted"), [(False, True), (True, False)])
def test_kernels_are_interpreted_only_where_there_is_no_gpu(gpu: bool, interpreted: bool) -> None:
    program = f"import torch; torch.cuda.is_available = lambda: {gpu}; import tests.conftest\n"
    program += "from triton import knobs; print(knobs.runtime.interpret)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(interpreted), result.stderr


def test_results_come_back_by_rank() -> None:
    results = run_workers(2, rank_and_sum, 5)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 5 + 6 for _, total in results)


def test_groups_and_their_threads_end_with_the_call() -> None:
    run_workers(2, make_groups)
    before = run_workers(2, num_groups_and_threads)
    run_workers(2, make_groups)
    assert run_workers(2, num_groups_and_threads) == before
    assert [groups for groups, _ in before] == [1, 1]


def test_the_pool_is_kept_between_calls() -> None:
    assert run_workers(2, process_id) == run_workers(2, process_id)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_names_the_rank_and_brings_its_traceback(rank: int) -> None:
    with pytest.raises(WorkerError, match=f"(?s)rank {rank}:.*fail_on.*ValueError: broken on purpose"):
        run_workers(2, fail_on, rank)
    assert len(run_workers(2, rank_and_sum, 0)) == 2


def test_a_worker_that_dies_does_not_hang_the_others() -> None:
    with pytest.raises(WorkerError, match="rank 1 died with exit code 3|rank 0:"):
        run_workers(2, die_on, 1)
