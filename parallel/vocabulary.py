"""Logits whose vocabulary is split between the ranks of a tensor group."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def likeliest_tokens(logits_wv: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Return the likeliest token of each row, int64 [w], the lowest where several are equal; the same on every rank.

    logits_wv: this rank's part of the vocabulary. vocab_size: tokens of the full vocabulary; later columns are padding.
    """
    part = logits_wv.shape[1]
    first = group.rank() * part
    token_v = torch.arange(first, first + part, device=logits_wv.device)
    best_w, place_w = logits_wv.float().masked_fill(token_v >= vocab_size, -torch.inf).max(-1)
    # all_reduce works in place, and best_w is still needed to see whose logit it was.
    most_w = best_w.clone()
    dist.all_reduce(most_w, op=dist.ReduceOp.MAX, group=group)
    # A rank without the best logit proposes vocab_size, which is above every token and so never the minimum.
    token_w = torch.where(best_w == most_w, first + place_w, vocab_size)
    dist.all_reduce(token_w, op=dist.ReduceOp.MIN, group=group)
    return token_w
