"""Mixers that the backward pass computes again, so that it needs no more of them than their input."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.tensor_parallel import checkpoint
from torch import Tensor

from megatron_sse.parallel.layout import TokenLayout


def recomputed(
    mix: Callable[[Tensor, TokenLayout], Any], hidden_LBd: Tensor, layout: TokenLayout, recompute: bool
) -> Any:
    """Return mix(hidden_LBd, layout); with `recompute` only `hidden_LBd` is kept of it for the backward pass."""
    if not recompute:
        return mix(hidden_LBd, layout)
    # Megatron-Core's form also restores its random states. It takes tensors only.
    return checkpoint(partial(_with_layout, mix, layout), False, hidden_LBd)


def _with_layout(mix: Callable[[Tensor, TokenLayout], Any], layout: TokenLayout, hidden_LBd: Tensor) -> Any:
    return mix(hidden_LBd, layout)
