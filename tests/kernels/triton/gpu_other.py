"""Convolution, norm, routing and decoding on a GPU, compiled, next to the torch forms in fp64 on the CPU. Run by name.

TRITON_INTERPRET=0 pytest THIS_FILE
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import conv, decode, norm, routing
from megatron_sse.recurrence import RECURRENCES
from tests.kernels.cases import Case, errors, make_inputs, rms
from tests.kernels.test_decode import CASES, generate
from tests.kernels.triton import test_conv, test_norm


def on_gpu(function: Callable) -> Callable:
    """Return the function with its tensors moved to the GPU, and its result back."""

    def run(*args):
        result = function(*(x.cuda() if isinstance(x, Tensor) else x for x in args))
        return result.cpu()

    return run


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(rms(a.double() - e) / rms(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("num_channels", [6, 70])
def test_short_convolution(num_channels: int, width: int) -> None:
    inputs = test_conv.make_inputs(num_channels, width)
    expected = test_conv.output_and_gradients(conv.short_convolution, inputs, torch.float64)
    assert worst(test_conv.output_and_gradients(on_gpu(conv.short_convolution), inputs, torch.float32), expected) < 1e-5


@pytest.mark.parametrize("num_picks", [0, 1, 3])
@pytest.mark.parametrize("value_dim", [32, 128])
def test_gated_norm(value_dim: int, num_picks: int) -> None:
    leaves = test_norm.make_leaves(value_dim, num_picks, with_gate=True)
    expected = test_norm.output_and_gradients(norm.gated_norm, leaves, torch.float64)
    assert worst(test_norm.output_and_gradients(on_gpu(norm.gated_norm), leaves, torch.float32), expected) < 1e-5


@pytest.mark.parametrize("num_partitions", [4, 16, 100])
def test_routing(num_partitions: int) -> None:
    """100,000 tokens get the same picks, in the same order."""
    lengths = torch.tensor([1, 50_000, 3, 20_000, 29_000, 995, 1])
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    generator = torch.Generator().manual_seed(0)
    prob_TN = torch.randn(len(document_T), num_partitions, generator=generator).softmax(-1)
    bank_TP = routing.route(prob_TN, 2, 2).bank_TP
    assert torch.equal(routing.route(prob_TN.cuda(), 2, 2).bank_TP.cpu(), bank_TP)
    sizes = (len(lengths), num_partitions)
    on_host = routing.sort_by_segment(bank_TP, document_T, *sizes)
    for a, b in zip(routing.sort_by_segment(bank_TP.cuda(), document_T.cuda(), *sizes), on_host, strict=True):
        assert torch.equal(a.cpu(), b)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if RECURRENCES[case.recurrence].has_triton], ids=str)
def test_decode_step(case: Case) -> None:
    inputs = make_inputs(case)
    expected = generate(decode.decode_step, case, inputs)

    def step(states: Tensor, slot: Tensor, shared, sparse, v: Tensor, routes, **options) -> Tensor:
        on_device = states.cuda()
        banks = [bank and bank.map(Tensor.cuda) for bank in (shared, sparse)]
        picks = routes and routing.Routes(
            *(x.cuda() for x in (routes.prob_TN, routes.bank_TP, routes.weight_TP)),
            *(routes.num_writers, routes.num_readers, routes.first_reader),
        )
        o_THV = decode.decode_step(on_device, slot.cuda(), *banks, v.cuda(), picks, **options)
        states.copy_(on_device)
        return o_THV.cpu()

    assert max(errors(generate(step, case, inputs.map(Tensor.float)), expected).values()) < 1e-5
