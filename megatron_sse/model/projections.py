"""Small projections of the SSE mixer."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear


class ReplicatedLinear(torch.nn.Module):
    """x W^T with all of W on every tensor rank.

    Under sequence parallelism each rank applies it to its part of the sequence, and Megatron-Core sums the gradients.
    """

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=dtype or config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight)


class LowRank(torch.nn.Module):
    """x A^T B^T (+ bias): A [rank, d] on every tensor rank, B [out, rank] split over them by rows."""

    def __init__(
        self,
        config: TransformerConfig,
        column_parallel_linear: type,
        rank: int,
        output_size: int,
        pg_collection: ProcessGroupCollection,
        bias: bool = False,
    ):
        super().__init__()
        self.down = ReplicatedLinear(config, config.hidden_size, rank)
        self.up = column_parallel_linear(
            rank,
            output_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pg_collection.tp,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project x [L, B, d] (a part of L under sequence parallelism) to [L, B, this rank's outputs]."""
        return self.up(self.down(x))[0]
