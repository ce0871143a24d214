"""The epilogue against its definition."""

import pytest
import torch

from megatron_sse.kernels.norm import gated_norm

T, P, H, V = 7, 2, 3, 10


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("with_picks", [False, True])
def test_gated_norm(with_picks: bool, with_gate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (T, H, V), (T, P, H, V), (V,), (T, H, V)
    o, picked, weight, gate = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    x = o + picked[:, 0] + picked[:, 1] if with_picks else o
    expected = x / (x.square().sum(-1, keepdim=True) / V + 1e-3).sqrt() * weight
    if with_gate:
        expected = expected * gate / (1 + (-gate).exp())
    actual = gated_norm(o, picked if with_picks else None, weight, gate if with_gate else None, 1e-3)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_low_precision_is_rounded_once() -> None:
    """Outputs that cancel are summed in full precision and rounded once."""
    o = torch.full((1, 1, 4), 256.0, dtype=torch.bfloat16)
    picked = torch.stack((torch.tensor([1.0, 2, 3, 4]), torch.full((4,), -256.0))).bfloat16()[None, :, None]
    y = gated_norm(o, picked, torch.ones(4), None, 0.0)
    assert torch.equal(y.flatten(), (torch.tensor([1.0, 2, 3, 4]) / 7.5**0.5).bfloat16())


def test_dtype_is_the_gates() -> None:
    o, weight = torch.randn(2, 3, 4), torch.ones(4)
    assert gated_norm(o, None, weight, o.bfloat16(), 1e-5).dtype == torch.bfloat16
    assert gated_norm(o.bfloat16(), None, weight, o, 1e-5).dtype == torch.float32
