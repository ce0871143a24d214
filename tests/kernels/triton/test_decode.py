"""The decoding kernel against the torch form in fp64, over several tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import decode
from megatron_sse.recurrence import RECURRENCES
from tests.kernels.cases import Case, errors, make_inputs
from tests.kernels.test_decode import CASES, generate


def run_triton(states: Tensor, *args, gate: str, weight_writes: bool, weight_reads: bool) -> Tensor:
    return decode.decode_on_triton(states, *args, gate == "reference", weight_writes, weight_reads)


@torch.no_grad()
def error(case: Case, step: Callable[..., Tensor] = run_triton) -> float:
    inputs = make_inputs(case)
    expected = generate(decode.decode_step, case, inputs)
    return max(errors(generate(step, case, inputs.map(Tensor.float)), expected).values())


@pytest.mark.parametrize("case", [case for case in CASES if RECURRENCES[case.recurrence].has_triton], ids=str)
def test_decode_step(case: Case) -> None:
    assert error(case) < 1e-6


@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_several_blocks(recurrence: str) -> None:
    # Blocks have 4096 / 128 = 32 columns; the last one is partial.
    assert error(Case(recurrence=recurrence, lengths=(2, 1), key_dim=100, value_dim=70, initial=True)) < 1e-6


def forget_the_writers(states, place, shared, sparse, v, routes, **options) -> Tensor:
    return run_triton(states, place, shared, sparse, v, replace(routes, num_writers=3), **options)


def decay_twice(states, place, shared, sparse, v, routes, **options) -> Tensor:
    return run_triton(states, place, shared, replace(sparse, g=2 * sparse.g), v, routes, **options)


def mistake_the_place(states, place, *args, **options) -> Tensor:
    return run_triton(states, torch.where(place < 0, place, place % 3 + 1), *args, **options)


@pytest.mark.parametrize("step", [forget_the_writers, decay_twice, mistake_the_place])
def test_a_seeded_bug_is_seen(step: Callable[..., Tensor]) -> None:
    assert error(CASES[1], step) > 1e-3
