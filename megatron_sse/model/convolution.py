"""The short convolution in front of a mixer."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.parallel.layout import TokenLayout


class InputConvolution(torch.nn.Module):
    """In front of a mixer: every channel of its input is a weighted sum over the document's last tokens.

    All that the mixer makes of its input sees it, the router too. The weight is on every tensor rank; under sequence
    parallelism each convolves its part of the sequence, and Megatron-Core sums the gradients.
    """

    def __init__(self, config: TransformerConfig, width: int, layer_number: int, pg_collection: ProcessGroupCollection):
        super().__init__()
        self.layer_number = layer_number
        self.conv_weight = torch.nn.Parameter(torch.empty(config.hidden_size, width, dtype=config.params_dtype))
        self.conv_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.parts = pg_collection.tp if config.sequence_parallel else None
        self.group = pg_collection.tp_cp if config.sequence_parallel else pg_collection.cp

    def forward(self, x_LBd: Tensor, layout: TokenLayout) -> Tensor:
        """Convolve x [L, B, d], under sequence parallelism this rank's part of L."""
        return layout.convolve(self.layer_number, "input", x_LBd, self.conv_weight, self.group, self.parts)
