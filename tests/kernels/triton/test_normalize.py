"""Normalised queries and keys and their gradients, against torch in fp64."""

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels.banks import l2_normalize
from megatron_sse.kernels.triton.normalize import normalize

SHAPE = (37, 3, 20)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x1, x2, grad1, grad2 = torch.randn(4, *SHAPE, generator=generator).unbind()
    # A row of zeros, a tiny and a large one.
    x1[0, 0], x1[1], x2[2] = 0, 1e-6 * x1[1], 1e6 * x2[2]
    return [x1.requires_grad_(), x2.requires_grad_(), grad1, grad2]


def wanted(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    y = l2_normalize(x)
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


@pytest.mark.parametrize("number", [2, 4])
def test_matches_torch(number: int) -> None:
    x1, x2, grad1, grad2 = inputs()
    x3, x4 = (x.detach().flip(0).requires_grad_() for x in (x1, x2))
    pairs = [(x1, grad1), (x2, grad2), (x3, grad2), (x4, grad1)][:number]
    ys = normalize([x for x, _ in pairs], torch.float32)
    grads = torch.autograd.grad(list(ys), [x for x, _ in pairs], [grad for _, grad in pairs])
    for y, grad, pair in zip(ys, grads, pairs, strict=True):
        for actual, expected in zip((y, grad), wanted(*pair), strict=True):
            # Row by row, since their sizes differ; the last bits of fp32.
            error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
            assert error[expected.norm(dim=-1) > 0].max() < 2e-6
    assert not ys[0][0, 0].any()


def test_dtypes() -> None:
    x1, x2, grad1, grad2 = inputs()
    y1, y2 = normalize([x1.detach().bfloat16(), x2], torch.bfloat16)
    assert y1.dtype == y2.dtype == torch.bfloat16
    assert torch.equal(y2, l2_normalize(x2).bfloat16())
    assert torch.autograd.grad(y2, x2, grad2.bfloat16())[0].dtype == torch.float32
