"""The short convolution against torch's conv1d, document by document."""

import pytest
import torch

from megatron_sse.kernels import short_convolution


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 9, 1, 3, 4)], ids=str)
def test_short_convolution(lengths: tuple[int, ...], width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(6, width, dtype=torch.float64, generator=generator).requires_grad_()
    position = torch.cat([torch.arange(length) for length in lengths])
    documents = [
        torch.nn.functional.conv1d(torch.nn.functional.pad(part.T, (width - 1, 0)), weight[:, None], groups=6).T
        for part in x.split(lengths)
    ]
    results = []
    for y in (short_convolution(x, weight, position), torch.cat(documents)):
        grad_y = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        results.append((y, *torch.autograd.grad(y, (x, weight), grad_y)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
