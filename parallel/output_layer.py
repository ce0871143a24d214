"""The output layer, whose rows are split over a tensor group, and what is computed with it in chunks of tokens.

Here v counts this rank's rows, T the tokens of its context rank, and C those of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class OutputLayer:
    """How the output layer is split, and how it is computed.

    Attributes:
        vocab_size: tokens of the vocabulary; later rows of the weight pad it and take no part.
        group: the tensor ranks that hold its rows.
        sequence_parallel: whether each of them holds a part of the tokens.
        chunk: tokens whose logits exist at the same time.
        fused: whether operations on logits are compiled into few kernels.
        accumulate: whether the weight's gradient is added to `main_grad` by NVIDIA Apex's kernel, in the product.
    """

    vocab_size: int
    group: dist.ProcessGroup
    sequence_parallel: bool = False
    chunk: int = 1024
    fused: bool = False
    accumulate: bool = False

    def real_rows(self, num_rows: int) -> int:
        """Return how many of this rank's `num_rows` rows belong to tokens."""
        return min(max(self.vocab_size - self.group.rank() * num_rows, 0), num_rows)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield chunks of nearly equal size, so that compiled operations see one shape, or two."""
        count = -(-num_tokens // self.chunk)
        size = -(-num_tokens // count)
        return (slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size))


class WeightGradient:
    """The gradient of this rank's rows, summed over chunks in fp32: in Megatron's `main_grad`, or in a tensor."""

    def __init__(self, weight_vd: Tensor, main_grad: Tensor | None, layer: OutputLayer):
        self.weight, self.layer = weight_vd, layer
        self.is_main = main_grad is not None
        dtype = torch.promote_types(weight_vd.dtype, torch.float32)
        self.sum_vd = torch.zeros_like(weight_vd, dtype=dtype) if main_grad is None else main_grad

    def add(self, grad_Cv: Tensor, hidden_Cd: Tensor) -> None:
        if self.layer.accumulate and self.is_main:
            import fused_weight_gradient_mlp_cuda

            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden_Cd, grad_Cv, self.sum_vd)
        elif grad_Cv.dtype == self.sum_vd.dtype:
            self.sum_vd.addmm_(grad_Cv.t(), hidden_Cd)
        else:
            self.sum_vd += grad_Cv.t() @ hidden_Cd

    def result(self) -> Tensor:
        """Return what autograd takes for the gradient."""
        if not self.is_main:
            return self.sum_vd.to(self.weight.dtype)
        # Megatron-Core's mark for DDP, which then leaves the gradient that autograd has alone; with zero_out_wgrad
        # (tied embeddings on one stage) it adds it, since the embedding's own gradient is in it.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.zeros_like(self.weight)


@functools.cache
def compiled(function: Any) -> Any:
    """Return the function with its operations fused."""
    return torch.compile(function)


def all_tokens(own_Td: Tensor, layer: OutputLayer) -> Tensor:
    """Return all tokens' rows, of which each tensor rank holds a part under sequence parallelism."""
    if not layer.sequence_parallel:
        return own_Td
    all_Td = own_Td.new_empty(len(own_Td) * layer.group.size(), own_Td.shape[1])
    dist.all_gather_into_tensor(all_Td, own_Td.contiguous(), group=layer.group)
    return all_Td


def sum_over_rows(grad_Td: Tensor, layer: OutputLayer) -> Tensor:
    """Sum what each tensor rank's rows give to the gradient; return this rank's tokens."""
    if not layer.sequence_parallel:
        if layer.group.size() > 1:
            dist.all_reduce(grad_Td, group=layer.group)
        return grad_Td
    own_Td = grad_Td.new_empty(len(grad_Td) // layer.group.size(), grad_Td.shape[1])
    dist.reduce_scatter_tensor(own_Td, grad_Td, group=layer.group)
    return own_Td
