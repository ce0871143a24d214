"""Effective rank of states whose rank is known."""

import pytest
import torch

from megatron_sse.inspection.rank import effective_rank


def test_effective_rank() -> None:
    """States [X, A, H, K, V] with full rank, rank one and rank zero."""
    one = torch.zeros(4, 4)
    one[0] = torch.arange(4)
    states = torch.stack((3 * torch.eye(4), one, torch.zeros(4, 4)))[None, :, None]
    assert effective_rank(states).tolist() == pytest.approx([4, 1, 0])
