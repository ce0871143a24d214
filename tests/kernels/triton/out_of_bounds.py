"""A test that ttsem has to fail: the last block of a kernel without a mask writes behind the tensor's end."""

import torch
import triton
import triton.language as tl


@triton.jit
def fill_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1.0)


def test_fill() -> None:
    x = torch.zeros(100)
    fill_kernel[(2,)](x, BLOCK=64)
    assert (x == 1).all()
