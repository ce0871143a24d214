"""Token-by-token generation against the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import route
from megatron_sse.kernels.decode import decode_step
from tests.kernels.cases import Case, Inputs, errors, make_inputs, routes_of, run
from tests.kernels.implementations import oracle

LENGTHS = (5, 1, 9)
SPREAD = dict(lengths=LENGTHS, num_value_heads=4, key_dim=6, value_dim=10, initial=True)
CASES = [
    Case(**SPREAD),
    Case(**SPREAD, num_writers=1, num_readers=3, weight_writes=False),
    Case(**SPREAD, num_writers=2, num_readers=1, weight_reads=False, decay="underflow"),
    Case(**SPREAD, num_partitions=0),
    Case(**SPREAD, num_partitions=2, num_writers=2, own_reads=True),
    Case(**SPREAD, recurrence="gdn"),
    Case(**SPREAD, recurrence="gdn", num_partitions=2, own_reads=True),
    Case(**SPREAD, recurrence="gdn", num_writers=1, num_readers=3, weight_writes=False, beta_max=2.0),
    Case(**SPREAD, recurrence="gdn", num_writers=2, num_readers=1, gate="reference", weight_reads=False),
    Case(**SPREAD, recurrence="gdn", num_partitions=0),
    Case(**SPREAD, recurrence="kda"),
    Case(**SPREAD, recurrence="kda", num_writers=1, num_readers=3, weight_writes=False, beta_max=2.0),
    Case(**SPREAD, recurrence="kda", num_writers=2, num_readers=1, gate="reference", decay="underflow"),
    Case(**SPREAD, recurrence="kda", num_partitions=0),
]


def generate(step: Callable[..., Tensor], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Run a step function on a batch with one sequence per document, padded at its end, places in reverse order."""
    dtype = inputs.v_THV.dtype
    num_sequences, offsets = len(case.lengths), inputs.offsets_D1
    places = torch.arange(num_sequences).flip(0) + 1
    states = torch.full((num_sequences + 2, *inputs.initial_DAHKV.shape[1:]), 7.0, dtype=dtype)
    states[places] = inputs.initial_DAHKV
    options = {name: getattr(case, name) for name in ("gate", "weight_writes", "weight_reads")}
    o_THV = torch.empty_like(inputs.v_THV)
    for position in range(max(case.lengths)):
        ended = position >= offsets.diff()
        token = torch.where(ended, 0, offsets[:-1] + position)
        banks = [b and b.map(lambda x, token=token: x[token]) for b in (inputs.shared, inputs.sparse)]
        routes = routes_of(case, inputs, token)
        place = torch.where(ended, -1, places)
        o = step(states, place, *banks, inputs.v_THV[token], routes, **options)
        assert o[ended].count_nonzero() == 0
        o_THV[token[~ended]] = o[~ended]
    assert (states[[0, -1]] == 7).all()
    return {"o": o_THV, "final": states[places]}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_step(case: Case) -> None:
    inputs = make_inputs(case)
    expected = dict(zip(("o", "final"), run(oracle, case, inputs), strict=True))
    assert max(errors(generate(decode_step, case, inputs), expected).values()) < 1e-13


def test_only_padding() -> None:
    case = Case(**SPREAD)
    inputs = make_inputs(case)
    states, place = inputs.initial_DAHKV.detach().clone(), torch.full((sum(LENGTHS),), -1)
    routes = route(inputs.prob_TN, 1, 1)
    with torch.no_grad():
        o_THV = decode_step(states, place, inputs.shared, inputs.sparse, inputs.v_THV, routes)
    assert o_THV.count_nonzero() == 0 and torch.equal(states, inputs.initial_DAHKV)


@torch.no_grad()
@pytest.mark.parametrize("recurrence", ["gla", "kda"])
def test_no_sizes_depend_on_the_data(recurrence: str) -> None:
    """On the meta device, as on a GPU without waiting for it, the number of active tokens is not known."""
    case = Case(**SPREAD, recurrence=recurrence)
    inputs = make_inputs(case).to("meta")
    routes = routes_of(case, inputs)
    place = torch.empty(sum(LENGTHS), dtype=torch.int64, device="meta")
    o_THV = decode_step(inputs.initial_DAHKV.clone(), place, inputs.shared, inputs.sparse, inputs.v_THV, routes)
    assert o_THV.shape == inputs.v_THV.shape
