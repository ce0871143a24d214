"""Megatron-Core's linear layers, as plain products where no tensor group splits them.

Its own autograd function splits, gathers and sums; on one tensor rank it only adds a third to the time of a small
product. Weights, their names and their initial values are those of the base classes.
"""

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """A linear layer with its outputs split over the tensor group."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the product, and the bias where it is to be added later."""
        if not _is_plain(self):
            return super().forward(input_, weight, runtime_gather_output)
        return _product(self, input_, self.weight if weight is None else weight)


class RowLinear(RowParallelLinear):
    """A linear layer with its inputs split over the tensor group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product, and the bias where it is to be added later."""
        return _product(self, input_, self.weight) if _is_plain(self) else super().forward(input_)


def _is_plain(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    return layer.tp_group.size() == 1 and not layer.gradient_accumulation_fusion


def _product(
    layer: ColumnParallelLinear | RowParallelLinear, input_: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    later = layer.skip_bias_add
    return F.linear(input_, weight, None if later else layer.bias), layer.bias if later else None
