"""The Triton kernels keep inf and nan of a document out of the others, and forget where a log decay is -inf."""

from dataclasses import replace

import pytest
import torch

from megatron_sse.kernels import decode, norm, routing, scan, sse, triton_attention
from tests.kernels import test_resets
from tests.kernels.cases import Case, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention, oracle
from tests.kernels.test_non_finite import LENGTHS, poison, results, with_steps_that_forget

SIZES = {"num_heads": 1, "num_value_heads": 1, "key_dim": 16, "value_dim": 16, "num_partitions": 2, "num_readers": 2}
CASE = Case(lengths=LENGTHS, **SIZES)
POISONS = (("v", torch.inf), ("shared.k", torch.nan), ("sparse.g", -torch.inf))


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, norm, routing, scan, sse):
        monkeypatch.setattr(module, "use_triton", lambda x: x.dtype != torch.float64, raising=False)
    monkeypatch.setattr(triton_attention, "choose_chunks_per_piece", lambda num_rows, programs: 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", ["varlen", "mask"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_a_document_hears_nothing_of_the_one_before(recurrence: str, form: str) -> None:
    """All values in one run, since the interpreter is slow; tests/kernels/test_non_finite.py has them one by one."""
    case = replace(CASE, recurrence=recurrence)
    inputs = make_inputs(case).map(lambda x: x.float())
    expected = results(form, case, inputs)
    for tensor, value in POISONS:
        inputs = poison(inputs, tensor, value)
    actual = results(form, case, inputs)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("form", ["varlen", "mask"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_a_log_decay_of_minus_infinity_forgets(recurrence: str, form: str) -> None:
    case = replace(CASE, recurrence=recurrence, decay="underflow", initial=True)
    inputs = with_steps_that_forget(case)
    expected = outputs_and_gradients(oracle, case, inputs)
    actual = outputs_and_gradients(attention(form), case, inputs.map(lambda x: x.float()))
    worst = {name: error for name, error in errors(actual, expected).items() if not error < 1e-5}
    assert not worst


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_documents_as_resets_hear_nothing_of_the_one_before(recurrence: str) -> None:
    """The documents share chunks, and the one with the value crosses spans.

    Scores inside a chunk are quotients of decays from its start, whose rounding is all that other documents change: by
    2.5e-7 of the largest number here.
    """
    case = replace(CASE, recurrence=recurrence, lengths=(30, 1, 9, 30), num_partitions=1, num_readers=1)
    function, first = test_resets.HandedOn(case, (20, 16, 34)).attend("varlen"), 40
    inputs = make_inputs(case).map(lambda x: x.float())
    _, clean = test_resets.results(function, case, inputs, first)
    for tensor, token, value in (("v", 34, torch.inf), ("sparse.k", 36, torch.nan), ("shared.g", 37, -torch.inf)):
        inputs = test_resets.poison(inputs, tensor, token, value)
    o_THV, actual = test_resets.results(function, case, inputs, first)
    for name, x in clean.items():
        assert (actual[name] - x).abs().max() <= 5e-7 * x.abs().max(), name
    assert o_THV[:34].isfinite().all() and not o_THV[34:first].isfinite().any()
