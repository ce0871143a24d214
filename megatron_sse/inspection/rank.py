"""Effective rank: how many directions a state uses."""

import torch
from torch import Tensor


def effective_rank(states_XBHKV: Tensor) -> Tensor:
    """Return the effective rank of each bank [B], a mean over sequences and heads; 0 for an empty state.

    It is the exponential of the entropy of the singular values as shares of their sum: r equal values give r.
    """
    value_XBHS = torch.linalg.svdvals(states_XBHKV.float())
    total_XBH1 = value_XBHS.sum(-1, keepdim=True)
    # The clamp keeps empty states from dividing by zero; the last factor makes their rank 0.
    share_XBHS = value_XBHS / total_XBH1.clamp(min=1e-20)
    rank_XBH = torch.special.entr(share_XBHS).sum(-1).exp() * (total_XBH1[..., 0] > 0)
    return rank_XBH.mean((0, 2))
