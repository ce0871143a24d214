"""The compiled kernels on a GPU. Run by name: pytest THIS_FILE

compute-sanitizer --tool memcheck (racecheck) python -m pytest THIS_FILE -k small finds invalid accesses.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import Routes, sse_attention
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention, attention_in_spans, oracle, oracle_in_spans
from tests.kernels.triton.rounding import errors_of_bf16

SMALL = Case(lengths=(1, 130, 3), key_dim=16, value_dim=16, num_partitions=3, num_writers=2, num_readers=2)
LONG = replace(SMALL, lengths=(700, 3, 1500), num_partitions=5)
DIMS = ((64, 64), (128, 128), (96, 192), (256, 256))
every_recurrence = pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])


@pytest.fixture(autouse=True)
def no_waiting_for_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(case: Case) -> Inputs:
    return make_inputs(case).map(lambda x: x.float()).to("cuda")


@every_recurrence
@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (attention("varlen"), oracle),
        (attention("mask"), oracle),
        (attention_in_spans("varlen"), oracle_in_spans),
    ],
    ids=["varlen", "mask", "resets"],
)
def test_small_fp32(function: Callable, reference: Callable, recurrence: str) -> None:
    case = replace(SMALL, recurrence=recurrence, num_value_heads=4, decay="underflow", initial=True)
    expected = outputs_and_gradients(reference, case, make_inputs(case))
    actual = {name: x.cpu() for name, x in outputs_and_gradients(function, case, on_gpu(case)).items()}
    worst = {name: error for name, error in errors(actual, expected).items() if not error < 1e-5}
    assert not worst


@every_recurrence
@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
def test_bf16_costs_at_most_twice_what_it_costs_plain_torch(key_dim: int, value_dim: int, recurrence: str) -> None:
    case = replace(LONG, recurrence=recurrence, key_dim=key_dim, value_dim=value_dim)
    worse = {name: pair for name, pair in errors_of_bf16(case, "cuda").items() if not pair[0] < 2 * pair[1]}
    assert not worse


@every_recurrence
def test_does_not_wait_for_the_device(recurrence: str) -> None:
    case = replace(SMALL, recurrence=recurrence)
    inputs = on_gpu(case)
    outputs_and_gradients(attention("varlen"), case, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    step(case, inputs)


def step(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return output and gradients, computed without random numbers or copies from the host.

    First with a state for each document, as in generation, then with documents that are resets, as in training.
    """
    from tests.kernels.cases import run

    found: list[Tensor] = []
    for function in (attention("varlen"), attention_in_one_span):
        o_THV, final = run(function, case, inputs)
        found += [o_THV, *torch.autograd.grad(o_THV.square().sum() + final.sum(), list(inputs.leaves().values()))]
    return tuple(found)


def attention_in_one_span(inputs: Inputs, routes: Routes | None, initial_DAHKV: None = None, **options: Any) -> Any:
    num_tokens, device = len(inputs.v_THV), inputs.v_THV.device
    offsets_Y1, span_T = num_tokens * torch.arange(2, device=device), torch.zeros_like(inputs.document_T)
    options |= {"form": "varlen", "document_T": inputs.document_T}
    out = sse_attention(inputs.shared, inputs.sparse, inputs.v_THV, routes, offsets_Y1, span_T, **options)
    return out.o_THV, out.final_YAHKV


@every_recurrence
def test_forward_and_backward_in_one_cuda_graph(recurrence: str) -> None:
    case = replace(LONG, recurrence=recurrence)
    inputs = on_gpu(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs)
    # Other values give other picks and segments in the same captured launches.
    other = make_inputs(case, seed=1)
    for leaf, x in zip(inputs.leaves().values(), other.leaves().values(), strict=True):
        leaf.data.copy_(x.data)
    graph.replay()
    for actual, expected in zip(captured, step(case, inputs), strict=True):
        assert torch.equal(actual, expected)


@every_recurrence
def test_twice_the_same_bits(recurrence: str) -> None:
    case = replace(LONG, recurrence=recurrence)
    inputs = on_gpu(case)
    assert all(torch.equal(a, b) for a, b in zip(step(case, inputs), step(case, inputs), strict=True))


@every_recurrence
def test_offsets_beyond_32_bits(recurrence: str) -> None:
    """140,000 tokens and picks of 32 heads with 256 values exceed 2^31 elements; results at both ends are compared."""
    lengths = (200, 139_600, 200)
    case = replace(SMALL, recurrence=recurrence, lengths=lengths, num_heads=32, num_value_heads=32)
    case = replace(case, key_dim=16, value_dim=256, num_writers=1, num_readers=1)
    torch.manual_seed(0)
    last = replace(case, lengths=(200,))
    inputs = on_gpu(last)
    long = _padded(inputs, sum(lengths) - 200)
    with torch.no_grad():
        expected = outputs(last, inputs)
        actual = outputs(case, replace(long, offsets_D1=_offsets(lengths), document_T=_documents(lengths)))
    assert actual.numel() * 2 > 2**31
    assert (actual[-200:] - expected).norm() < 1e-5 * expected.norm()


def outputs(case: Case, inputs: Inputs) -> Tensor:
    from tests.kernels.cases import run

    return run(attention("varlen"), case, inputs)[0]


def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).cuda()


def _documents(lengths: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()


def _padded(inputs: Inputs, rows: int) -> Inputs:
    """Return the inputs after `rows` copies of their first row."""
    return inputs.map(lambda x: torch.cat((x[:1].expand(rows, *x.shape[1:]), x)))
