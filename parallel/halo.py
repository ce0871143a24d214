"""Short convolutions over slots: each looks back at the last tokens before it, which other ranks may hold."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.kernels import short_convolution
from megatron_sse.parallel.sharding import Chain


def tokens_before(x_FBLc: Tensor, width: int, chain: Chain, group: ProcessGroup) -> Tensor:
    """Return the `width` tokens before each of this rank's slots, [F, B, width, c]; zeros before the sequence.

    Slots may be shorter than `width`. Forward is one all-gather of the slots' last tokens, backward one reduce-scatter.

    Args:
        x_FBLc: this rank's tokens, slot by slot and sequence by sequence.
        chain: the slots of all ranks of the group, in the order of the sequence.
    """
    tail, num_slots = x_FBLc[:, :, -width:], len(x_FBLc)
    if group.size() > 1:
        tail = gather_from_sequence_parallel_region(tail, group=group)
    ordered = torch.cat([tail[rank * num_slots + slot] for rank, slot in chain], dim=1)
    ordered = torch.nn.functional.pad(ordered, (0, 0, width, 0))
    # `ordered` is `width` zeros and then every slot's tail, so the tokens before slot number `place` start at
    # place * (tokens per tail). With width 3 and slots of 2 tokens: 0 0 0 | a b | c d | e f; before slot 2 are b c d.
    places = [chain.index((group.rank(), slot)) for slot in range(num_slots)]
    return torch.stack([ordered[:, place * tail.shape[2] :][:, :width] for place in places])


def convolve_slots(
    x_FBLc: Tensor, weight_cW: Tensor, position_FBL: Tensor, chain: Chain, group: ProcessGroup
) -> Tensor:
    """Apply kernels.short_convolution to this rank's slots of each sequence, which continue those of other ranks.

    Args:
        position_FBL: int64, each token's position in its document.
        chain: the slots of all ranks of the group, in the order of the sequence.
    """
    width = weight_cW.shape[1] - 1
    # Slot by slot, each behind the tokens before it, whose own outputs are dropped.
    x_FBLc = torch.cat((tokens_before(x_FBLc, width, chain, group), x_FBLc), dim=2)
    position_FBL = torch.nn.functional.pad(position_FBL, (width, 0))
    out = short_convolution(x_FBLc.flatten(0, 2), weight_cW, position_FBL.flatten())
    return out.view_as(x_FBLc)[:, :, width:]
