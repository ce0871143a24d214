"""The last tokens before each slot, for what looks back a fixed number of tokens."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.parallel.sharding import ContextShard


def tokens_before(x_FBLC: Tensor, width: int, shard: ContextShard, group: ProcessGroup) -> Tensor:
    """The `width` tokens before each of this rank's slots, [F, B, width, C]; zeros before the sequence.

    Slots may be shorter than `width`. One all-gather of the slots' last tokens, one reduce-scatter backward.

    Args:
        x_FBLC: this rank's tokens, slot by slot and sequence by sequence.
    """
    tail = x_FBLC[:, :, -width:]
    if shard.size > 1:
        tail = gather_from_sequence_parallel_region(tail, group=group)
    num_slots = shard.num_slots
    ordered = torch.cat([tail[rank * num_slots + slot] for rank, slot in shard.chain], dim=1)
    ordered = torch.nn.functional.pad(ordered, (0, 0, width, 0))
    places = [shard.chain.index((shard.rank, slot)) for slot in range(num_slots)]
    return torch.stack([ordered[:, place * tail.shape[2] :][:, :width] for place in places])
