"""Modules have their weights only while they compute."""

import torch

from megatron_sse.pretrained.lending import compute_in_fp32, lend_weights


def test_one_module_at_a_time() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).requires_grad_(False)
    x, sizes = torch.randn(2, 3), []
    expected = network(x)
    for layer in network:
        values = {parameter: parameter.data.clone for parameter in layer.parameters()}
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)
        lend_weights(layer, values)
        layer.register_forward_pre_hook(lambda *_: sizes.append([p.numel() for p in network.parameters()]))
    assert torch.equal(network(x), expected)
    assert sizes == [[9, 3, 0, 0], [0, 0, 9, 3]]
    assert [p.numel() for p in network.parameters()] == [0, 0, 0, 0]


def test_fp32_copies_for_a_while() -> None:
    network = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    network.bfloat16().requires_grad_(False)
    # Tied, as output layers are to embeddings.
    network[1].weight = network[0].weight
    expected = network[0].weight.float()[[1, 2]] @ network[0].weight.float().t()
    compute_in_fp32(network)
    assert torch.equal(network(torch.tensor([1, 2])), expected)
    assert network[0].weight.dtype == torch.bfloat16
