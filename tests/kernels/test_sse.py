"""Both parallel forms against the oracle: output, final states and the gradient of every input."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import chunks
from tests.kernels.cases import UNEVEN, Case, errors, make_inputs, outputs_and_gradients, run
from tests.kernels.implementations import FORMS, attention, oracle
from tests.kernels.test_segments import keep_unused_chunks


@cache
def expected(case: Case) -> dict[str, Tensor]:
    return outputs_and_gradients(oracle, case, make_inputs(case))


# Cases for both recurrences.
COMMON = [
    Case(lengths=UNEVEN),
    Case(lengths=UNEVEN, initial=True, num_writers=2, num_readers=2),
    Case(lengths=(1,)),
    # A single chunk of a single head: nothing between it and others has to be copied.
    Case(lengths=(7,), num_heads=1, num_value_heads=1, num_partitions=0),
    Case(lengths=(1, 1, 1), initial=True),
    Case(lengths=(64, 64)),
    Case(routing="one"),
    Case(routing="gaps", initial=True),
    Case(routing="ties", num_writers=2, num_readers=2),
    Case(num_partitions=5, num_writers=2, num_readers=2),
    Case(num_partitions=5, num_writers=1, num_readers=3, initial=True),
    Case(num_partitions=5, num_writers=3, num_readers=1),
    Case(num_partitions=3, num_writers=3, num_readers=3),
    Case(num_partitions=2, lengths=UNEVEN, own_reads=True),
    Case(num_partitions=5, num_writers=2, num_readers=3, own_reads=True, initial=True),
    Case(num_partitions=3, own_reads=True, weight_writes=False),
    Case(num_partitions=1),
    Case(num_partitions=0, lengths=UNEVEN),
    Case(num_partitions=0, initial=True, value_dim=5),
    Case(value_dim=5, initial=True),
    Case(value_dim=13),
    Case(num_value_heads=4, value_dim=6),
    Case(num_heads=1, num_value_heads=3, initial=True),
    Case(weight_writes=False),
    Case(weight_reads=False, num_readers=2),
    Case(weight_writes=False, weight_reads=False, num_writers=2),
    Case(decay="one", lengths=UNEVEN, initial=True),
    Case(decay="underflow", lengths=UNEVEN, initial=True),
]
DELTA_RULE = [
    Case(beta_max=2.0, lengths=UNEVEN, initial=True),
    Case(beta_max=2.0, decay="one", num_value_heads=4),
    Case(gate="reference", num_writers=2, num_readers=2),
    Case(gate="reference", num_readers=2, weight_reads=False),
    Case(gate="reference", num_writers=2, weight_writes=False, initial=True),
]
CASES = COMMON + [replace(case, recurrence=name) for name in ("gdn", "kda") for case in COMMON + DELTA_RULE]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case, form: str) -> None:
    actual = outputs_and_gradients(attention(form), case, make_inputs(case))
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < 1e-12}
    assert not worst


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_any_chunk_size(recurrence: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(recurrence=recurrence, lengths=UNEVEN, initial=True)
    monkeypatch.setattr(chunks, "choose_chunk_size", lambda *sizes: size)
    actual = outputs_and_gradients(attention("varlen"), case, make_inputs(case))
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < 1e-12}
    assert not worst


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_chunks_that_are_not_used_change_nothing(recurrence: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where their number is not known: on the CPU they are left out."""
    case = Case(recurrence=recurrence, lengths=UNEVEN, initial=True, routing="gaps")
    keep_unused_chunks(monkeypatch)
    actual = outputs_and_gradients(attention(form), case, make_inputs(case))
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < 1e-12}
    assert not worst


@pytest.mark.parametrize(("rows", "segments", "size"), [(640, 10, 32), (639, 10, 16), (319, 10, 8), (10, 10, 8)])
def test_chunk_size(rows: int, segments: int, size: int) -> None:
    assert chunks.choose_chunk_size(rows, segments) == size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["long", "one", "underflow"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_fp32_against_the_fp64_oracle(recurrence: str, decay: str, form: str) -> None:
    case = Case(recurrence=recurrence, decay=decay, lengths=UNEVEN, num_writers=2, num_readers=2, initial=True)
    actual = outputs_and_gradients(attention(form), case, make_inputs(case).map(lambda x: x.float()))
    assert actual["o"].dtype == actual["final"].dtype == torch.float32
    # Twice the measured error (3.6e-7, in the delta rule's gates).
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < 8e-7}
    assert not worst


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", ["gla", "gdn", "kda"])
def test_bf16_is_rounded_only_where_it_enters_and_leaves(recurrence: str, form: str) -> None:
    """Inputs as in training: queries, keys and values in bf16, gates and router in fp32."""
    case = Case(recurrence=recurrence, lengths=UNEVEN, num_writers=2, num_readers=2, num_value_heads=4)
    rounded = make_inputs(case).map(lambda x: x.bfloat16().double())
    mixed = rounded.map(lambda x: x.float())
    for bank in (mixed.shared, mixed.sparse):
        bank.q_THK.data, bank.k_THK.data = bank.q_THK.data.bfloat16(), bank.k_THK.data.bfloat16()
    mixed.v_THV.data = mixed.v_THV.data.bfloat16()
    expected, actual = (run(f, case, x) for f, x in ((oracle, rounded), (attention(form), mixed)))
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    error = errors(dict(zip("of", actual, strict=True)), dict(zip("of", expected, strict=True)))
    assert error["o"] < 2**-8 and error["f"] < 1e-6, error
