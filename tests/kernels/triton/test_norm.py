"""The epilogue's kernels and gradients, against the torch form in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import norm
from megatron_sse.kernels.triton import norm as triton_norm
from tests.kernels.cases import rms

T, H, EPS = 75, 3, 1e-5


def make_leaves(value_dim: int, num_picks: int, with_gate: bool) -> list[Tensor | None]:
    """Return leaves: output, picks, weight, gate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, H, value_dim), (T, num_picks, H, value_dim), (value_dim,), (T, H, value_dim)]
    leaves: list[Tensor | None] = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [leaves[0], leaves[1] if num_picks else None, leaves[2], leaves[3] if with_gate else None]


def output_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor | None], dtype) -> list[Tensor]:
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in leaves]
    y = function(*leaves, EPS)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], weight.to(y.dtype))]


def error(leaves: list[Tensor | None], dtype: torch.dtype = torch.float32) -> float:
    expected = output_and_gradients(norm.gated_norm, leaves, torch.float64)
    actual = output_and_gradients(triton_norm.gated_norm, leaves, dtype)
    assert all(x.dtype == dtype for x in actual)
    return max(rms(a - e) / rms(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("num_picks", [0, 1, 3])
@pytest.mark.parametrize("value_dim", [32, 21])
def test_gated_norm(value_dim: int, num_picks: int, with_gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # There are fewer partial sums than blocks, so programs process several.
    monkeypatch.setattr(triton_norm, "MAX_PARTIALS", 2)
    assert error(make_leaves(value_dim, num_picks, with_gate)) < 1e-6


def test_low_precision() -> None:
    leaves = [None if x is None else x.bfloat16().double() for x in make_leaves(32, 2, True)]
    assert error(leaves, torch.bfloat16) < 4e-3


def test_a_missing_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = triton_norm._constants
    monkeypatch.setattr(triton_norm, "_constants", lambda *args: constants(*args) | {"P": 1})
    assert error(make_leaves(32, 2, True)) > 1e-2
