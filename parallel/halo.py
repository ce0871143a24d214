"""The last tokens before each slot, for operations that look back a fixed number of tokens (short convolutions)."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.parallel.sharding import Chain


def tokens_before(x_FBLC: Tensor, width: int, chain: Chain, group: ProcessGroup) -> Tensor:
    """Return the `width` tokens before each of this rank's slots, [F, B, width, C]; zeros before the sequence.

    Slots may be shorter than `width`. Forward is one all-gather of the slots' last tokens, backward one reduce-scatter.

    Args:
        x_FBLC: this rank's tokens, slot by slot and sequence by sequence.
        chain: the slots of all ranks of the group, in the order of the sequence.
    """
    tail, num_slots = x_FBLC[:, :, -width:], len(x_FBLC)
    if group.size() > 1:
        tail = gather_from_sequence_parallel_region(tail, group=group)
    ordered = torch.cat([tail[rank * num_slots + slot] for rank, slot in chain], dim=1)
    ordered = torch.nn.functional.pad(ordered, (0, 0, width, 0))
    # `ordered` is `width` zeros and then every slot's tail, so the tokens before slot number `place` start at
    # place * (tokens per tail). With width 3 and slots of 2 tokens: 0 0 0 | a b | c d | e f; before slot 2 are b c d.
    places = [chain.index((group.rank(), slot)) for slot in range(num_slots)]
    return torch.stack([ordered[:, place * tail.shape[2] :][:, :width] for place in places])
