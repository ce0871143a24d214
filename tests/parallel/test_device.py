"""The CPU stand-ins for CUDA: the CPU serves Megatron-Core's CUDA calls, also in the backward pass."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch.overrides import _get_current_function_mode_stack

from megatron_sse.parallel.device import CudaOnCpu, Device, setup_device
from tests.workers import run_workers


class AsksForCuda(torch.autograd.Function):
    """A function that creates tensors on "cuda" in both directions, as Megatron-Core does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(3, device="cuda")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.full((3,), 2.0, device=torch.device("cuda", 0))


def describe() -> tuple[Device, list[str]]:
    device = setup_device(0)
    x = torch.ones(3)
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1], device="cuda:0"),
        torch.empty(2, device=torch.cuda.current_device()),
        x.cuda(),
        x.to("cuda"),
        x.to(torch.cuda.current_device()),
    ]
    torch.cuda.synchronize()
    device.synchronize()
    return device, [tensor.device.type for tensor in made] + [x.type(), x.bfloat16().type()]


def backward_asks_for_cuda(how: str) -> torch.Tensor:
    x = torch.zeros(3, requires_grad=True)
    if how == "recompute":
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        checkpoint(AsksForCuda.apply, False, x).sum().backward()
    elif how == "grad":
        [x.grad] = torch.autograd.grad(AsksForCuda.apply(x).sum(), [x])
    else:
        AsksForCuda.apply(x).sum().backward()
    assert x.grad is not None
    return x.grad


def dropout_inside_and_outside() -> tuple[list[torch.Tensor], int]:
    """Return alternating draws outside and inside the tracker's fork, and the number of messages it logged."""
    messages: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = messages.append  # type: ignore[assignment,method-assign]
    logging.getLogger("megatron").addHandler(handler)
    model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    tracker = get_cuda_rng_tracker()
    draws = []
    for _ in range(2):
        with tracker.fork():
            draws.append(torch.rand(4))
        draws.append(torch.rand(4))
    logging.getLogger("megatron").removeHandler(handler)
    return draws, len(messages)


def drop_half(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.5)


def recomputed_dropout() -> bool:
    model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(drop_half, False, x)
    y.sum().backward()
    return x.grad is not None and torch.equal(y.detach(), x.grad)


def install_twice() -> int:
    setup_device(0)
    setup_device(0)
    return sum(isinstance(mode, CudaOnCpu) for mode in _get_current_function_mode_stack())


def test_cuda_tensors_land_on_the_cpu() -> None:
    [(device, answers)] = run_workers(1, describe)
    assert (device.type, device.backend) == ("cpu", "gloo")
    assert answers == ["cpu"] * 6 + ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
    assert device.peak_memory_bytes() > 2**20


@pytest.mark.parametrize("how", ["backward", "grad", "recompute"])
def test_the_stand_ins_hold_in_the_backward_pass(how: str) -> None:
    [gradient] = run_workers(1, backward_asks_for_cuda, how)
    assert torch.equal(gradient, torch.full((3,), 2.0))


def test_random_numbers_of_the_tracker_and_outside_are_two_streams() -> None:
    [(draws, num_messages)] = run_workers(1, dropout_inside_and_outside)
    inside = torch.rand(8, generator=torch.Generator().manual_seed(5 + 2718))
    outside = torch.rand(8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(draws[0::2]), inside)
    assert torch.equal(torch.cat(draws[1::2]), outside)
    assert num_messages == 0


def test_recompute_draws_the_same_dropout() -> None:
    assert run_workers(1, recomputed_dropout) == [True]


def test_installing_twice_is_installing_once() -> None:
    assert run_workers(1, install_twice) == [1]


def test_the_log_says_once_that_there_is_no_gpu_and_nothing_else_is_said() -> None:
    program = (
        "import logging; logging.basicConfig(); logging.getLogger('megatron_sse').setLevel(logging.INFO)\n"
        "from megatron_sse.parallel.device import setup_device\n"
        "import megatron.core.optimizer, megatron.core.models.gpt\n"
        "setup_device(0); setup_device(0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.count("no GPU found") == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_gpu_machine_gets_cuda_and_nccl_and_no_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    picked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    current_device = torch.cuda.current_device
    assert setup_device(3) == Device("cuda", "nccl", "some GPU")
    assert picked == [3]
    assert torch.cuda.current_device is current_device
