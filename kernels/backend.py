"""Which form of the arithmetic takes a tensor: decided here, asked at every entry that has two forms."""

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Check whether the Triton kernels take a tensor: on GPUs all but fp64, in which only tests compute."""
    return x.is_cuda and x.dtype != torch.float64
