"""Effective rank: how many directions a state uses."""

import torch
from torch import Tensor


def effective_rank(states_XAHKV: Tensor) -> Tensor:
    """Return the effective rank of each bank [A], a mean over sequences and heads; 0 for an empty state.

    It is the exponential of the entropy of the singular values as shares of their sum: r equal values give r.
    """
    value_XAHs = torch.linalg.svdvals(states_XAHKV.float())
    total_XAH1 = value_XAHs.sum(-1, keepdim=True)
    # The clamp keeps empty states from dividing by zero; the last factor makes their rank 0.
    share_XAHs = value_XAHs / total_XAH1.clamp(min=1e-20)
    rank_XAH = torch.special.entr(share_XAHs).sum(-1).exp() * (total_XAH1[..., 0] > 0)
    return rank_XAH.mean((0, 2))
