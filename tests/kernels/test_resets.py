"""Documents as resets inside spans: like the oracle, with initial states, and with states handed from span to span."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import Edges, chunks, registry, scan, segments
from megatron_sse.kernels.resets import PieceResets
from megatron_sse.kernels.scan import apply_transition
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients, run
from tests.kernels.implementations import FORMS, attention_in_spans, oracle_in_spans
from tests.kernels.test_properties import RECURRENCES, NoHostSync

CASES = [
    Case(lengths=(1, 11, 1, 14, 3), num_partitions=2, own_reads=True, initial=True),
    # The last document leaves most partitions untouched.
    Case(lengths=(1,) * 8 + (9, 2), num_partitions=6, num_writers=2, num_readers=2),
    Case(lengths=(17, 1, 1, 5), num_partitions=0, num_value_heads=4, value_dim=5, decay="underflow", initial=True),
]
CASES += [replace(case, recurrence=name) for name in ("gdn", "kda") for case in CASES]
CASES += [Case(recurrence="gdn", lengths=(5, 1, 12), gate="reference", num_writers=2, beta_max=2.0)]


def with_forms(cases: list[Case]) -> list[tuple[Case, str]]:
    """Return the cases with each form; without partitions both are the same."""
    return [(case, form) for case in cases for form in FORMS if case.num_partitions or form == "varlen"]


@cache
def expected(case: Case) -> dict[str, Tensor]:
    return outputs_and_gradients(oracle_in_spans, case, make_inputs(case))


def worst_errors(function: Callable, case: Case, tolerance: float) -> dict[str, float]:
    actual = outputs_and_gradients(function, case, make_inputs(case))
    return {name: error for name, error in errors(actual, expected(case)).items() if not error < tolerance}


@pytest.mark.parametrize(("case", "form"), with_forms(CASES), ids=str)
def test_matches_the_oracle(case: Case, form: str) -> None:
    assert not worst_errors(attention_in_spans(form), case, 1e-12)


class HandedOn:
    """Spans that get each other's states only through `exchange`, one after the other; documents may cross them."""

    def __init__(self, case: Case, spans: tuple[int, ...]) -> None:
        document_T, ends = make_inputs(case).document_T, torch.tensor(spans).cumsum(0)
        first_F, last_F = document_T[ends - torch.tensor(spans)], document_T[ends - 1]
        continues_F = torch.cat((torch.tensor([False]), last_F[:-1] == first_F[1:]))
        carries_F = continues_F & (first_F == last_F)
        number_F1 = torch.arange(len(spans))[:, None]
        self.spans, self.edges = spans, Edges(number_F1, continues_F[:, None], carries_F[:, None], self.exchange)

    def attend(self, form: str) -> Callable:
        return attention_in_spans(form, self.spans, self.edges)

    @staticmethod
    def exchange(transition_F: Tensor, state_F: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        entering = [torch.zeros_like(state_F[0])]
        for transition, state in zip(transition_F[:-1], state_F[:-1], strict=True):
            is_reset = ~transition.flatten(1).any(1)[:, None, None]
            entering.append(apply_transition(transition, entering[-1].masked_fill(is_reset, 0)) + state)
        return torch.stack(entering), lambda begun: begun


# Spans that begin inside documents, with one, and inside one that fills a span; the last document begins in the middle.
CROSSING = Case(lengths=(13, 1, 5, 26, 3, 4), num_partitions=3, num_writers=2, num_readers=2)
SPANS = (9, 7, 13, 13, 10)
# Most spans have no row in some of the banks.
MANY_BANKS = replace(CROSSING, num_partitions=12, num_writers=1, num_readers=1)
HANDED_ON = [
    replace(case, recurrence=name) for case in (replace(CROSSING, num_partitions=0), MANY_BANKS) for name in RECURRENCES
]


@pytest.mark.parametrize(("case", "form"), with_forms(HANDED_ON), ids=str)
def test_spans_hand_their_states_on(case: Case, form: str) -> None:
    assert not worst_errors(HandedOn(case, SPANS).attend(form), case, 1e-12)


def results(function: Callable, case: Case, inputs: Inputs, first: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return all outputs; by name those from token `first` on, the last states, and these tokens' gradients."""
    o_THV, final = run(function, case, inputs)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(o_THV[first:].square().sum() + final.square().sum(), list(leaves.values()))
    after = {name: x[first:] for name, x in zip(leaves, gradients, strict=True)}
    return o_THV, {"o": o_THV[first:], "final": final} | after


def poison(inputs: Inputs, tensor: str, token: int, value: float) -> Inputs:
    poisoned = inputs.map(torch.clone)
    poisoned.leaves()[tensor].data[token] = value
    return poisoned


# Tensor, token and value: several at once, to save time.
POISONS = [
    [("v", 15, torch.inf), ("sparse.q", 15, torch.inf), ("shared.g", 16, torch.nan)],
    [("sparse.g", 14, -torch.inf), ("v", 15, 1e308), ("shared.k", 17, torch.nan)],
]


@pytest.mark.parametrize("in_spans", [False, True], ids=["one span", "handed on"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_document_hears_nothing_of_the_one_before(recurrence: str, form: str, in_spans: bool) -> None:
    """Bit by bit, though the documents share chunks, and the one with the value crosses spans."""
    case = replace(CROSSING, recurrence=recurrence)
    function = HandedOn(case, SPANS).attend(form) if in_spans else attention_in_spans(form)
    inputs, first = make_inputs(case), sum(case.lengths[:3])
    _, clean = results(function, case, inputs, first)
    for values in POISONS:
        poisoned = inputs
        for value in values:
            poisoned = poison(poisoned, *value)
        o_THV, actual = results(function, case, poisoned, first)
        assert all(torch.equal(actual[name], x) for name, x in clean.items()), values
        assert o_THV[:15].isfinite().all() and o_THV[first:].isfinite().all()
        assert not o_THV[15:first].isfinite().any()


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_what_is_not_finite_reaches_the_end_of_its_document(recurrence: str) -> None:
    """Also across spans, into the states that are handed on, and into the last state."""
    case = replace(CROSSING, recurrence=recurrence)
    function = HandedOn(case, SPANS).attend("varlen")
    o_THV, final = run(function, case, poison(make_inputs(case), "v", 21, torch.inf))
    assert o_THV[:21].isfinite().all() and not o_THV[21:45].isfinite().any() and o_THV[45:].isfinite().all()
    assert final.isfinite().all()
    _, final = run(function, case, poison(make_inputs(case), "v", 50, torch.inf))
    assert not final[:, 0].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_an_initial_state_that_is_not_finite_ends_with_its_document(recurrence: str, form: str) -> None:
    case = replace(CROSSING, recurrence=recurrence, initial=True)
    inputs, function = make_inputs(case), attention_in_spans(form)
    first = case.lengths[0]
    clean, poisoned = (results(function, case, x, first)[1] for x in (inputs, poison(inputs, "initial", 0, torch.nan)))
    assert all(torch.equal(poisoned[name], x) for name, x in clean.items() if name != "initial")


def multiply_what_spans_pass_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scan, "_empty", lambda state, where: state * ~where[..., None, None, None])


def select_nothing_in_chunks(patch: pytest.MonkeyPatch) -> None:
    read = chunks._ReadBeforeResets.apply
    patch.setattr(chunks._ReadBeforeResets, "apply", lambda *args: read(*args[:-1], torch.zeros_like(args[-1])))


def select_nothing_in_the_scan(patch: pytest.MonkeyPatch) -> None:
    cut = segments.cut

    def without(*args, **options):
        pieces = cut(*args, **options)
        inside = pieces.resets._replace(inside_M=torch.zeros_like(pieces.resets.inside_M))
        return replace(pieces, resets=inside)

    patch.setattr(segments, "cut", without)


def keep_bad_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(registry, "find_bad_rows", lambda g, *others: torch.zeros(len(g), dtype=torch.bool))


@pytest.mark.parametrize(
    "mutate",
    [multiply_what_spans_pass_on, select_nothing_in_chunks, select_nothing_in_the_scan, keep_bad_rows],
)
def test_a_product_in_place_of_a_selection_is_seen(mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_document_hears_nothing_of_the_one_before("gdn", "varlen", True)
        test_an_initial_state_that_is_not_finite_ends_with_its_document("gdn", "varlen")


def forget_the_last_document(patch: pytest.MonkeyPatch) -> None:
    """Take the state after a segment's last row for the last document's, whatever document it is of."""
    patch.setattr(PieceResets, "settle", lambda self, state_S: state_S)


def forget_the_first_row(patch: pytest.MonkeyPatch) -> None:
    """Let the state that enters a span enter a bank whose first row is of a later document."""
    find = segments.find_resets
    patch.setattr(segments, "find_resets", lambda document, entering, *rest: find(document, document, *rest))


@pytest.mark.parametrize("mutate", [forget_the_last_document, forget_the_first_row])
@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
def test_a_seeded_bug_is_seen(mutate, recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the test above of this case is green."""
    case = replace(MANY_BANKS, recurrence=recurrence)
    mutate(monkeypatch)
    assert worst_errors(HandedOn(case, SPANS).attend("varlen"), case, 1e-3)


@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
def test_shapes_do_not_depend_on_the_documents(recurrence: str) -> None:
    """Meta tensors hold no values; nor do operations wait for the device."""
    shapes = []
    for lengths in ((52,), (1, 20, 31)):
        case = replace(CROSSING, recurrence=recurrence, lengths=lengths)
        shapes.append(kept_shapes(case))
    assert shapes[0] == shapes[1]
    with NoHostSync():
        outputs_and_gradients(attention_in_spans("varlen"), case, make_inputs(case))


def kept_shapes(case: Case) -> list[torch.Size]:
    """Return the shapes of what autograd keeps."""
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        run(attention_in_spans("varlen"), case, make_inputs(case).to("meta"))
    return shapes
