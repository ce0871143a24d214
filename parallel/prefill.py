"""Prefill over context ranks: each processes a part of a sequence's new tokens, and all keep the states after the last.

The parts follow each other in rank order. Nothing here has a gradient. U counts banks x heads, W the tokens of a tail.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.kernels import Edges
from megatron_sse.kernels.scan import apply_transition
from megatron_sse.kernels.segments import Exchange


def edges_behind(initial_UKV: Tensor, exchange: Exchange, rank: int) -> Edges:
    """Return the edges of a rank's part of one document that continues from its kept states.

    initial_UKV: what enters the first rank's part, known to all. exchange: hands states from part to part.
    """

    def enter(transition: Tensor, state_1UKV: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        initial_1UKV = initial_UKV[None]
        if rank == 0:
            # The exchange starts from zeros, so rank 0 publishes its final state and no dependence on what came before.
            state_1UKV = apply_transition(transition, initial_1UKV) + state_1UKV
            transition = torch.zeros_like(transition)
        begun, finish = exchange(transition, state_1UKV)

        def arrive(begun: Tensor) -> Tensor:
            entering_1UKV = finish(begun)
            return initial_1UKV if rank == 0 else entering_1UKV

        return begun, arrive

    # The part is one span of one document.
    only = torch.zeros(1, 1, dtype=torch.int64, device=initial_UKV.device)
    continues = torch.ones_like(only, dtype=torch.bool)
    return Edges(only, continues, continues, enter)


def of_last_rank(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the last rank's x on every rank."""
    x = x.contiguous()
    dist.broadcast(x, dist.get_global_rank(group, group.size() - 1), group)
    return x


def of_all_ranks(x_Lc: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tokens [L, ...] of all ranks one after the other, [ranks * L, ...]; every rank has the same number."""
    gathered = x_Lc.new_empty(group.size() * len(x_Lc), *x_Lc.shape[1:])
    dist.all_gather_into_tensor(gathered, x_Lc.contiguous(), group)
    return gathered


def tails(x_Lc: Tensor, kept_Wc: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the W tokens before this rank's part, and the last W of all parts.

    kept_Wc: the tokens before the first rank's part. A part may have fewer than W tokens.
    """
    width = len(kept_Wc)
    # The kept tokens and then every part's tail, so what precedes part r starts at r * (tokens per tail), as in halo.
    last = of_all_ranks(x_Lc[-width:], group)
    in_order = torch.cat((kept_Wc, last))
    start = group.rank() * (len(last) // group.size())
    return in_order[start : start + width], in_order[len(in_order) - width :]
