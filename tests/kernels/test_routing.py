"""The router's picks."""

import pytest
import torch

from megatron_sse.kernels import route


def test_picks_are_the_largest_best_first() -> None:
    prob = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    routes = route(prob, 2, 3)
    assert torch.equal(routes.weight_TP, prob.topk(3).values)
    assert torch.equal(routes.bank_TP, prob.topk(3).indices)


@pytest.mark.parametrize("num_partitions", [2, 5, 16, 33])
def test_ties_go_to_the_lower_index(num_partitions: int) -> None:
    prob = torch.full((40, num_partitions), 1 / num_partitions)
    prob[1::2, -1] *= 2
    routes = route(prob, 1, 2)
    assert routes.bank_TP[::2].tolist() == [[0, 1]] * 20
    assert routes.bank_TP[1::2].tolist() == [[num_partitions - 1, 0]] * 20


def test_weights_of_writers_and_readers() -> None:
    prob = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)
    routes = route(prob, 1, 2)
    torch.testing.assert_close(routes.write_weight_TP(True), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(routes.read_weight_TP(True), torch.tensor([[0.5, 0.3]]))
    assert routes.write_weight_TP(False).tolist() == [[1, 0]]
    torch.testing.assert_close(routes.scatter(routes.read_weight_TP(True)), torch.tensor([[0, 0.5, 0.3]]))
    (grad,) = torch.autograd.grad(routes.read_weight_TP(True).sum(), prob)
    assert grad.tolist() == [[0, 1, 1]]


def test_replayed_picks() -> None:
    prob = torch.tensor([[0.2, 0.5, 0.3]])
    routes = route(prob, 1, 1, torch.tensor([[2]]))
    torch.testing.assert_close(routes.weight_TP, torch.tensor([[0.3]]))
