"""Short convolutions over the tokens of documents, on context ranks and in sequences that go on."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.kernels import short_convolution
from megatron_sse.model.cache import CachedLayout
from megatron_sse.parallel.halo import tokens_before
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import Chain


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
        """x [L, B, d], under sequence parallelism this rank's part of L, to the same shape."""
        if isinstance(layout, CachedLayout):
            tail = layout.layers[self.layer_number].tails["input"]
            return tail.convolve(x_LBd[:, 0], self.conv_weight, layout, self.group)[:, None]
        chain, position_BL, num_slots = layout.shard.chain, layout.position_BL, layout.shard.num_slots
        if self.parts is not None:
            chain, num_slots = layout.shard.chain_of_parts(self.parts.size()), 1
            position_BL = position_BL.chunk(self.parts.size(), dim=1)[self.parts.rank()]
        x_FBLd = x_LBd.unflatten(0, (num_slots, -1)).transpose(1, 2)
        position_FBL = position_BL.unflatten(1, (num_slots, -1)).transpose(0, 1)
        out_FBLd = convolve_slots(x_FBLd, self.conv_weight, position_FBL, chain, self.group)
        return out_FBLd.transpose(1, 2).flatten(0, 1)


def convolve_slots(
    x_FBLC: Tensor, weight_CW: Tensor, position_FBL: Tensor, chain: Chain, group: ProcessGroup
) -> Tensor:
    """kernels.short_convolution over this rank's slots of each sequence, which go on those of other ranks.

    Args:
        position_FBL: int64, each token's position in its document.
        chain: the slots of all ranks of the group, in the order of the sequence.
    """
    width = weight_CW.shape[1] - 1
    # Slot by slot, each behind the tokens before it, whose own outputs are dropped.
    x_FBLC = torch.cat((tokens_before(x_FBLC, width, chain, group), x_FBLC), dim=2)
    position_FBL = torch.nn.functional.pad(position_FBL, (width, 0))
    out = short_convolution(x_FBLC.flatten(0, 2), weight_CW, position_FBL.flatten())
    return out.view_as(x_FBLC)[:, :, width:]
