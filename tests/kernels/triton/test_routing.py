"""Picks and their sorting, which equal the torch forms exactly."""

import pytest
import torch

from megatron_sse.kernels import route, routing
from megatron_sse.kernels.triton.routing import sort_by_segment, top_banks


def probabilities(num_tokens: int, num_partitions: int) -> torch.Tensor:
    """Return coarse probabilities, of which many are equal."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 5, (num_tokens, num_partitions), generator=generator) / 8


@pytest.mark.parametrize("num_partitions, num_picks", [(1, 1), (4, 1), (6, 2), (33, 3), (250, 8), (5, 5)])
def test_top_banks(num_partitions: int, num_picks: int) -> None:
    """Picks, their probabilities and the gradient of these are the torch form's."""
    prob_TN = probabilities(150, num_partitions).requires_grad_()
    expected = route(prob_TN, num_picks, num_picks)
    bank_TP, weight_TP = top_banks(prob_TN, num_picks)
    assert torch.equal(bank_TP, expected.bank_TP) and torch.equal(weight_TP, expected.weight_TP)
    grad_TP = torch.randn(150, num_picks, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad(x, prob_TN, grad_TP) for x in (weight_TP, expected.weight_TP))
    assert torch.equal(found[0], wanted[0])


def test_what_is_no_number_gives_valid_picks() -> None:
    prob_TN = probabilities(10, 6)
    prob_TN[3], prob_TN[5, 2:4], prob_TN[7, 1] = torch.nan, torch.nan, torch.inf
    bank_TP, weight_TP = top_banks(prob_TN, 6)
    expected = route(prob_TN, 6, 6)
    assert torch.equal(bank_TP, expected.bank_TP)
    torch.testing.assert_close(weight_TP, expected.weight_TP, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [(1,), (1, 0, 37, 1, 128, 0, 300, 83, 0)], ids=str)
@pytest.mark.parametrize("num_partitions, num_picks", [(1, 1), (4, 1), (6, 2), (40, 3)])
def test_sort_by_segment(num_partitions: int, num_picks: int, lengths: tuple[int, ...]) -> None:
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    bank_TP = route(probabilities(len(document_T), num_partitions), num_picks, num_picks).bank_TP
    arguments = bank_TP, document_T, len(lengths), num_partitions
    for actual, expected in zip(sort_by_segment(*arguments), routing.sort_by_segment(*arguments), strict=True):
        assert actual.dtype == torch.int64 and torch.equal(actual, expected)


def test_all_picks_in_one_bank() -> None:
    """Replayed picks may all name one partition, even twice for one token."""
    bank_TP, document_T = torch.full((300, 2), 3), torch.arange(300) // 150
    arguments = bank_TP, document_T, 2, 5
    for actual, expected in zip(sort_by_segment(*arguments), routing.sort_by_segment(*arguments), strict=True):
        assert torch.equal(actual, expected)
