"""The Triton kernels keep inf and nan of a document out of the others, and forget where a log decay is -inf."""

from dataclasses import replace

import pytest
import torch

from megatron_sse.kernels import decode, norm, routing, scan, sse, triton_attention
from tests.kernels.cases import Case, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention, oracle
from tests.kernels.test_non_finite import poison, results, with_steps_that_forget

CASE = Case(lengths=(37, 64, 5), num_heads=1, num_value_heads=1, key_dim=16, value_dim=16, num_readers=2)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, norm, routing, scan, sse):
        monkeypatch.setattr(module, "use_triton", lambda x: x.dtype != torch.float64, raising=False)
    monkeypatch.setattr(triton_attention, "choose_chunks_per_piece", lambda num_rows, programs: 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("tensor", "value"), [("v", torch.inf), ("shared.k", torch.nan), ("sparse.g", -torch.inf)])
@pytest.mark.parametrize("form", ["varlen", "mask"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
def test_a_document_hears_nothing_of_the_one_before(recurrence: str, form: str, tensor: str, value: float) -> None:
    case = replace(CASE, recurrence=recurrence)
    inputs = make_inputs(case).map(lambda x: x.float())
    expected = results(form, case, inputs)
    actual = results(form, case, poison(inputs, tensor, value))
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("form", ["varlen", "mask"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
def test_a_log_decay_of_minus_infinity_forgets(recurrence: str, form: str) -> None:
    case = replace(CASE, recurrence=recurrence, decay="underflow", initial=True)
    inputs = with_steps_that_forget(case)
    expected = outputs_and_gradients(oracle, case, inputs)
    actual = outputs_and_gradients(attention(form), case, inputs.map(lambda x: x.float()))
    worst = {name: error for name, error in errors(actual, expected).items() if not error < 1e-5}
    assert not worst
