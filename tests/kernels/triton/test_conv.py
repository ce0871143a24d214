"""The short convolution's kernels and gradients, against the torch form in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import conv
from megatron_sse.kernels.triton import conv as triton_conv
from tests.kernels.cases import rms

LENGTHS = (1, 37, 3, 1, 29)


def make_inputs(num_channels: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_Tc = torch.randn(sum(LENGTHS), num_channels, dtype=torch.float64, generator=generator)
    weight_cW = torch.randn(num_channels, width, dtype=torch.float64, generator=generator)
    # The first document starts before these tokens.
    position_T = torch.cat([torch.arange(length) for length in LENGTHS])
    position_T[0] = 5
    return x_Tc, weight_cW, position_T


def output_and_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype) -> list[Tensor]:
    x_Tc, weight_cW = (x.to(dtype).requires_grad_() for x in inputs[:2])
    y_Tc = function(x_Tc, weight_cW, inputs[2])
    grad_Tc = torch.randn(y_Tc.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [y_Tc, *torch.autograd.grad(y_Tc, (x_Tc, weight_cW), grad_Tc.to(dtype))]


def error(inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> float:
    expected = output_and_gradients(conv.short_convolution, inputs, torch.float64)
    actual = output_and_gradients(triton_conv.short_convolution, inputs, dtype)
    assert all(x.dtype == dtype for x in actual)
    return max(rms(a - e) / rms(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("num_channels", [6, 70])
def test_short_convolution(num_channels: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # There are fewer programs than blocks, so each processes several.
    monkeypatch.setattr(triton_conv, "MAX_PROGRAMS", 2)
    assert error(make_inputs(num_channels, width)) < 1e-6


def test_low_precision() -> None:
    x_Tc, weight_cW, position_T = make_inputs(6, 4)
    assert error((x_Tc.bfloat16().double(), weight_cW.bfloat16().double(), position_T), torch.bfloat16) < 4e-3


def test_looking_past_a_documents_start_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton_conv.short_convolution
    monkeypatch.setattr(triton_conv, "short_convolution", lambda x, weight, position: run(x, weight, position + 1))
    assert error(make_inputs(6, 4)) > 1e-2
