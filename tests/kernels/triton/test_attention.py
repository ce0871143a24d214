"""Complete attention on the Triton kernels against the oracle: outputs, final states, all gradients."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sse.kernels import decode, norm, routing, scan, sse, triton_attention
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention, attention_in_spans, oracle, oracle_in_spans
from tests.kernels.test_resets import HandedOn
from tests.kernels.triton.rounding import errors_of_bf16

LENGTHS = (1, 70, 3)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def small_pieces_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select the Triton kernels, with pieces so short that segments have several."""
    for module in (decode, norm, routing, scan, sse):
        monkeypatch.setattr(module, "use_triton", lambda x: x.dtype != torch.float64, raising=False)
    monkeypatch.setattr(triton_attention, "choose_chunks_per_piece", lambda num_rows, programs: 1)


BASE = Case(lengths=LENGTHS, num_heads=1, num_value_heads=1, key_dim=16, value_dim=16, num_partitions=3)
# The operators have tests with more cases; these cover the code around them.
CASES = [
    replace(BASE, num_value_heads=2, key_dim=12, value_dim=24, num_writers=2, num_readers=2, initial=True),
    replace(BASE, num_writers=1, num_readers=2, routing="ties", weight_writes=False),
    replace(BASE, num_partitions=2, num_writers=1, num_readers=2, own_reads=True, initial=True),
    replace(BASE, num_partitions=0, initial=True),
]
CASES += [replace(case, recurrence="gdn") for case in CASES]
CASES += [replace(BASE, recurrence="kda", num_partitions=2, num_readers=2, own_reads=True, initial=True)]
# In mask form all partitions are picks of the same kernels.
FORMS = [("varlen", case) for case in CASES] + [("mask", case) for case in CASES if case.routing == "ties"]


def fp32(inputs: Inputs) -> Inputs:
    return inputs.map(lambda x: x.float())


@pytest.mark.parametrize(("form", "case"), FORMS, ids=str)
def test_matches_the_oracle(form: str, case: Case) -> None:
    expected = outputs_and_gradients(oracle, case, make_inputs(case))
    actual = outputs_and_gradients(attention(form), case, fp32(make_inputs(case)))
    worst = {name: error for name, error in errors(actual, expected).items() if not error < TOLERANCE}
    assert not worst


# Documents that share chunks and pieces, as resets of one span or of spans that hand their states on.
PACKED = replace(BASE, lengths=(30, 1, 9, 50, 5), num_partitions=2, num_readers=2)
RESETS = [
    replace(PACKED, num_value_heads=2, key_dim=12, value_dim=24, own_reads=True, initial=True),
    replace(PACKED, recurrence="gdn", num_value_heads=2, key_dim=12, value_dim=24, own_reads=True, initial=True),
    replace(PACKED, recurrence="kda", num_value_heads=2, value_dim=24, num_partitions=1, num_readers=1, initial=True),
    # Chunks that forget a lot.
    replace(PACKED, decay="underflow", num_partitions=0),
    replace(PACKED, recurrence="kda", decay="underflow", num_partitions=0),
]


@pytest.mark.parametrize("case", RESETS, ids=str)
def test_documents_as_resets_match_the_oracle(case: Case) -> None:
    expected = outputs_and_gradients(oracle_in_spans, case, make_inputs(case))
    actual = outputs_and_gradients(attention_in_spans("varlen"), case, fp32(make_inputs(case)))
    worst = {name: error for name, error in errors(actual, expected).items() if not error < TOLERANCE}
    assert not worst


@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_states_from_elsewhere(recurrence: str) -> None:
    """The fourth document begins in the first span, fills the second and ends in the third."""
    case = replace(BASE, recurrence=recurrence, lengths=(30, 1, 9, 100, 5, 9), num_partitions=2, num_readers=2)
    expected = outputs_and_gradients(oracle_in_spans, case, make_inputs(case))
    handed_on = HandedOn(case, (70, 64, 20))
    actual = outputs_and_gradients(handed_on.attend("varlen"), case, fp32(make_inputs(case)))
    worst = {name: error for name, error in errors(actual, expected).items() if not error < TOLERANCE}
    assert not worst


@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_bf16_costs_at_most_twice_what_it_costs_plain_torch(recurrence: str) -> None:
    """The error of every output and gradient, gates included, is at most twice that of plain torch in bf16."""
    case = replace(BASE, recurrence=recurrence, num_writers=2, num_readers=2)
    worse = {name: pair for name, pair in errors_of_bf16(case).items() if not pair[0] < 2 * pair[1]}
    assert not worse


def test_compiled_as_one_graph() -> None:
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", "gla", "gdn", "kda"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_shapes_are_known_without_data(recurrence: str) -> None:
    case = replace(BASE, recurrence=recurrence, num_writers=2, num_readers=2, num_value_heads=2)
    inputs = fp32(make_inputs(case))
    actual = outputs_and_gradients(attention("varlen"), case, inputs.to("meta"))
    shapes = {"o": inputs.v_THV.shape, "final": (len(LENGTHS), 4, 2, 16, 16)}
    shapes |= {f"d {name}": x.shape for name, x in inputs.leaves().items()}
    assert {name: x.shape for name, x in actual.items()} == shapes


def read_rows_for_tokens(patch: pytest.MonkeyPatch) -> None:
    """Number picks by partition first, which is wrong."""
    lay_out, num_tokens = triton_attention.lay_out, sum(LENGTHS)

    def wrong(*args):
        rows, *rest = lay_out(*args)
        return replace(rows, token_R=rows.row_R % num_tokens), *rest

    patch.setattr(triton_attention, "lay_out", wrong)


def forget_the_leaving_gradient(patch: pytest.MonkeyPatch) -> None:
    for name, operators in triton_attention.OPERATORS.items():
        backward = operators.attend_backward
        wrong = operators._replace(attend_backward=lambda *args, f=backward: f(*args[:-1], torch.zeros_like(args[-1])))
        patch.setitem(triton_attention.OPERATORS, name, wrong)


@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
@pytest.mark.parametrize("mutate", [read_rows_for_tokens, forget_the_leaving_gradient])
def test_a_seeded_bug_is_seen(mutate, recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(BASE, recurrence=recurrence, num_writers=2, num_readers=2)
    expected = outputs_and_gradients(oracle, case, make_inputs(case))
    mutate(monkeypatch)
    actual = outputs_and_gradients(attention("varlen"), case, fp32(make_inputs(case)))
    assert max(errors(actual, expected).values()) > 1e-2
