"""Logits whose vocabulary is split between the ranks of a tensor group."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def likeliest_tokens(logits_XV: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Return the likeliest token of each row, int64 [X], the lowest where several are equal; the same on every rank.

    logits_XV: this rank's part of the vocabulary. vocab_size: tokens of the full vocabulary; later columns are padding.
    """
    part = logits_XV.shape[1]
    first = group.rank() * part
    token_V = torch.arange(first, first + part, device=logits_XV.device)
    best_X, place_X = logits_XV.float().masked_fill(token_V >= vocab_size, -torch.inf).max(-1)
    most_X = best_X.clone()
    dist.all_reduce(most_X, op=dist.ReduceOp.MAX, group=group)
    # A rank without the best logit proposes vocab_size, which is above every token and so never the minimum.
    token_X = torch.where(best_X == most_X, first + place_X, vocab_size)
    dist.all_reduce(token_X, op=dist.ReduceOp.MIN, group=group)
    return token_X
