"""Blocks and stages follow the GPU's shared memory, not its age."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_sse.kernels.triton import gdn, gla, kda
from megatron_sse.kernels.triton.delta_rule import Dims
from megatron_sse.kernels.triton.target import HOPPER, SHARED_LIMIT, Target, target_of


def plans(target: Target) -> Iterator[tuple[dict, dict]]:
    """Yield constants and options of every kernel for 16-bit inputs."""
    for dim in (128, 256):
        for module in (gdn, kda):
            for kernel in module.KERNELS.per_chunk + module.KERNELS.per_piece:
                yield module.KERNELS.plan(kernel, Dims(8, 8, dim, dim, torch.bfloat16), target)
        for kernel in gla._TILES:
            yield gla._configure(kernel, dim, dim, 1, torch.bfloat16, False, target)


def on_a(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, shared: int) -> Target:
    """Return the target of a GPU that torch describes so."""
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target_of.cache_clear()
    target = target_of(torch.device("cuda"))
    target_of.cache_clear()
    return target


def test_a_new_gpu_with_little_shared_memory_gets_the_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_120 is newer than Hopper and has 99 KiB; with Hopper's blocks its launches would fail."""
    ampere = on_a(monkeypatch, 8, 0, 163 << 10)
    consumer = on_a(monkeypatch, 12, 0, 99 << 10)
    assert (consumer.arch, consumer.shared) == (120, SHARED_LIMIT[120])
    assert list(plans(consumer)) == list(plans(ampere)) != list(plans(HOPPER))


def test_a_new_gpu_with_much_gets_the_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    large = on_a(monkeypatch, 10, 0, 227 << 10)
    for kernel in gdn.KERNELS.per_piece:
        dims = Dims(8, 8, 256, 256, torch.bfloat16)
        assert gdn.KERNELS.plan(kernel, dims, large) == gdn.KERNELS.plan(kernel, dims, HOPPER)
    assert list(plans(large)) != list(plans(on_a(monkeypatch, 12, 0, 99 << 10)))


def test_the_interpreter_plans_like_hopper() -> None:
    assert target_of(torch.device("cpu")) == HOPPER
