"""The CPU stand-ins for CUDA: the CPU serves Megatron-Core's CUDA calls, also in the backward pass."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch.overrides import _get_current_function_mode_stack

from megatron_sse.parallel.device import CudaOnCpu, Device, setup_device
from megatron_sse.parallel.groups import init_process_group
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


@pytest.mark.parametrize(
    ("tensor", "says", "expected"),
    [(1, "9.0", None), (2, "9.0\n9.0", "1"), (2, "8.0", "1"), (2, "10.0", None), (2, "12.0", None), (2, "N/A", "1")],
)
def test_one_connection_only_with_tensor_parallelism_before_blackwell(
    tensor: int, says: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ntest $1 = --query-gpu=compute_cap && echo '{says}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = settings_of(monkeypatch, tensor)
    assert environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert settings_of(monkeypatch, 2, **given) == given


def settings_of(monkeypatch: pytest.MonkeyPatch, tensor: int, **given: str) -> dict[str, str]:
    """Return the variables for CUDA when it is first asked for, in an environment with those that are given."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, str] = {}

    def first_asked() -> bool:
        seen.update({name: os.environ[name] for name in names if name in os.environ})
        return True

    monkeypatch.setattr(torch.cuda, "is_available", first_asked)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    setup_device(0, tensor)
    return seen


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_process_group_knows_its_gpu(device: str, launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: calls.append(options))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    if launched:
        monkeypatch.setenv("RANK", "3")
    init_process_group(Device(device, "some backend", ""))
    [options] = calls
    assert options.get("device_id") == (torch.device("cuda", 3) if device == "cuda" else None)
    assert ("store" in options) == (not launched)
