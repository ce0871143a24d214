"""Logits whose vocabulary is split between the ranks of a tensor group."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def likeliest_tokens(logits_XV: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """The likeliest token of each row, the first one of several, int64 [X]; the same on every rank.

    logits_XV: this rank's part of the vocabulary. vocab_size: tokens of the whole; what follows them is padding.
    """
    part = logits_XV.shape[1]
    first = group.rank() * part
    token_V = torch.arange(first, first + part, device=logits_XV.device)
    best_X, place_X = logits_XV.float().masked_fill(token_V >= vocab_size, -torch.inf).max(-1)
    # A copy: each rank compares its own with the best of all.
    most_X = best_X.clone()
    dist.all_reduce(most_X, op=dist.ReduceOp.MAX, group=group)
    token_X = torch.where(best_X == most_X, first + place_X, vocab_size)
    dist.all_reduce(token_X, op=dist.ReduceOp.MIN, group=group)
    return token_X
