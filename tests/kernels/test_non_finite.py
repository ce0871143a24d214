"""Documents do not hear of each other, whatever their values: inf and nan end with the document that has them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sse.model.features import delta_decay
from megatron_sse.parallel.handoff.fold import take_over
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients, run
from tests.kernels.implementations import FORMS, attention, oracle

RECURRENCES = ("gla", "gdn", "kda")
LENGTHS = (37, 64, 5)


def poison(inputs: Inputs, tensor: str, value: float) -> Inputs:
    """Return the inputs with `value` in one token of the first document."""
    poisoned = inputs.map(torch.clone)
    poisoned.leaves()[tensor].data[LENGTHS[0] // 2] = value
    return poisoned


def results(form: str, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return outputs and states of the second document and those after it, and the gradients of their tokens."""
    o_THV, final = run(attention(form), case, inputs)
    o_THV, final = o_THV[LENGTHS[0] :], final[1:]
    leaves = {name: x for name, x in inputs.leaves().items() if name != "initial"}
    gradients = torch.autograd.grad(o_THV.square().sum() + final.square().sum(), list(leaves.values()))
    after = {name: x[LENGTHS[0] :] for name, x in zip(leaves, gradients, strict=True)}
    return {"o": o_THV, "final": final} | after


@pytest.mark.parametrize(("tensor", "value"), [("v", torch.inf), ("shared.k", torch.nan), ("sparse.g", -torch.inf)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_document_hears_nothing_of_the_one_before(recurrence: str, form: str, tensor: str, value: float) -> None:
    case = Case(recurrence=recurrence, lengths=LENGTHS, num_writers=2, num_readers=2)
    inputs = make_inputs(case)
    expected = results(form, case, inputs)
    actual = results(form, case, poison(inputs, tensor, value))
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def with_steps_that_forget(case: Case) -> Inputs:
    """Return inputs in which one log decay in four is -inf."""
    inputs = make_inputs(case)
    for bank in (inputs.shared, inputs.sparse):
        if bank is not None:
            bank.g.data[bank.g < -1000] = -torch.inf
    return inputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("case", [Case(), Case(num_partitions=0), Case(num_readers=3, own_reads=True)], ids=str)
def test_a_log_decay_of_minus_infinity_forgets(recurrence: str, form: str, case: Case) -> None:
    case = replace(case, recurrence=recurrence, decay="underflow", lengths=LENGTHS, initial=True)
    inputs = with_steps_that_forget(case)
    assert inputs.shared.g.isinf().any() and not inputs.shared.g.isinf().all()
    expected = outputs_and_gradients(oracle, case, inputs)
    actual = outputs_and_gradients(attention(form), case, inputs)
    worst = {name: error for name, error in errors(actual, expected).items() if not error < 1e-12}
    assert not worst


@pytest.mark.parametrize("log_rate", [87.0, 89.0, 1000.0])
def test_a_rate_of_any_size_forgets(log_rate: float) -> None:
    """A rate that overflows is no nan, neither in the decay nor in its gradients."""
    logit = torch.tensor([-200.0, -20.0, 0.0, 20.0], requires_grad=True)
    rate, bias = torch.tensor(log_rate, requires_grad=True), torch.zeros(1, requires_grad=True)
    decay = delta_decay(logit, rate, bias).exp()
    assert decay.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert all(x.isfinite().all() for x in torch.autograd.grad(decay.sum(), (logit, rate, bias)))


@pytest.mark.parametrize("columns", [1, 3])
def test_a_transition_of_zero_takes_nothing_over(columns: int) -> None:
    """Where a document starts the transition is 0: what enters is not multiplied but dropped."""
    state = torch.tensor([torch.inf, torch.nan, 2.0]).view(3, 1).expand(2, 3, 4)
    transition = torch.zeros(2, 3, columns)
    transition[1] = 1.0
    result = take_over(transition, state)
    assert result[0].count_nonzero() == 0 and not result[1].isfinite().all()
