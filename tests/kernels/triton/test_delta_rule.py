"""Kernels of the delta rule, with a decay per head or per channel, and the scan between them against the oracle."""

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import Routes
from megatron_sse.kernels.routing import sort_by_segment
from megatron_sse.kernels.scan import scan_states
from megatron_sse.kernels.segments import Segments
from megatron_sse.kernels.triton import delta_rule, gdn, kda
from megatron_sse.kernels.triton_attention import OPERATORS
from megatron_sse.kernels.triton_rows import Rows, make_rows
from tests.kernels.cases import UNEVEN, Case, Inputs, errors, make_inputs, outputs_and_gradients, rms
from tests.kernels.implementations import oracle

CHUNKS_PER_PIECE = 2
TOLERANCE = 1e-5


class _Attend(torch.autograd.Function):
    """An operation from tokens' inputs to rows' outputs and segments' final states."""

    @staticmethod
    def forward(ctx, recurrence: str, rows: Rows, writes_R, initial, write_R, read_R, *tensors):
        ctx.operators = operators = OPERATORS[recurrence]
        arguments = operators.prepare([*tensors, writes_R, write_R, read_R, *rows.tables], rows.num_tokens)
        transition, increment = operators.summarize(*arguments)
        entering, final = scan_states(transition, increment, rows.pieces, initial)
        ctx.rows, ctx.kept = rows, (arguments, transition, increment, entering, initial)
        return operators.attend(*arguments, operators.meet(*arguments), entering), final

    @staticmethod
    def backward(ctx, grad_o, grad_final):
        operators, rows, (arguments, transition, increment, entering, initial) = ctx.operators, ctx.rows, ctx.kept
        with torch.enable_grad():
            leaves = [increment.requires_grad_(), initial.requires_grad_()]
            states = scan_states(transition, increment, rows.pieces, initial)
        grad_states = operators.summarize_backward(*arguments, grad_o), grad_final
        grad_leaving, grad_initial = torch.autograd.grad(states, leaves, grad_states)
        again = operators.again(*arguments, entering)
        *by_row, grad_write, grad_read = operators.attend_backward(*arguments, again, grad_o, grad_leaving)
        shared = [x[: rows.num_tokens] for x in by_row]
        sparse = [x[rows.num_tokens :].view(rows.num_tokens, -1, *x.shape[1:]).sum(1) for x in by_row]
        grads = *shared[:4], *sparse[:4], shared[4] + sparse[4]
        return None, None, None, grad_initial, grad_write, grad_read, *grads


def kernels(inputs: Inputs, routes: Routes | None, weight_writes, weight_reads, gate, initial_DAHKV):
    """Compute attention through the kernels, with the signature of tests.kernels.implementations.attention."""
    num_tokens, num_heads, value_dim = inputs.v_THV.shape
    num_documents = len(inputs.offsets_D1) - 1
    shared = inputs.shared.normalize()
    ones = inputs.v_THV.new_ones(num_tokens, dtype=torch.float32)
    if routes is None:
        sparse, num_picks, writes_R, write_R, read_R = shared, 0, ones, ones, ones
        segments = Segments(inputs.offsets_D1)
    else:
        sparse, num_picks = inputs.sparse.normalize(), routes.bank_TP.shape[1]
        scales = [routes.write_weight_TP(False), routes.write_weight_TP(weight_writes)]
        scales = [*scales, routes.read_weight_TP(weight_reads)]
        writes_R, write_R, read_R = (torch.cat((ones, x.flatten())) for x in scales)
        order, offsets = sort_by_segment(routes.bank_TP, inputs.document_T, num_documents, routes.num_partitions)
        row = torch.cat((torch.arange(num_tokens), num_tokens + order))
        segments = Segments(torch.cat((inputs.offsets_D1, num_tokens + offsets[1:])), row)
    rows = make_rows(segments, num_tokens, num_picks, CHUNKS_PER_PIECE)
    shape = (segments.num_segments, num_heads, shared.q_THK.shape[-1], value_dim)
    initial = torch.zeros(shape)
    if initial_DAHKV is not None:
        initial = torch.cat((initial_DAHKV[:, 0], initial_DAHKV[:, 1:].flatten(0, 1)))
    banks = [x for bank in (shared, sparse) for x in (bank.q_THK, bank.k_THK, bank.g, bank.beta_TH)]
    o_R, final = _Attend.apply(shared.recurrence.name, rows, writes_R, initial, write_R, read_R, *banks, inputs.v_THV)
    o = o_R[:num_tokens] + o_R[num_tokens:].view(num_tokens, -1, num_heads, value_dim).sum(1)
    final_sparse = final[num_documents:].view(num_documents, -1, *final.shape[1:])
    return o, torch.cat((final[:num_documents, None], final_sparse), 1)


def case(**options) -> Case:
    sizes = {"recurrence": "gdn", "key_dim": 16, "value_dim": 16, "num_heads": 1, "num_value_heads": 1}
    return Case(**sizes | options)


@cache
def expected(case: Case) -> dict[str, Tensor]:
    return outputs_and_gradients(oracle, case, make_inputs(case))


CASES = [
    case(lengths=(66, 1), num_partitions=5, num_writers=2, num_readers=3, initial=True),
    case(lengths=(1, 1, 1), initial=True, beta_max=2.0),
    case(lengths=(66,), value_dim=32, num_heads=2, num_value_heads=4, num_partitions=0),
    case(lengths=(20, 3), key_dim=12, value_dim=24, num_value_heads=2, num_partitions=1, beta_max=2.0, initial=True),
    case(lengths=(66,), key_dim=144, value_dim=8, num_partitions=0),
    case(lengths=UNEVEN, num_partitions=0, initial=True),
    case(lengths=(300,), num_partitions=0, decay="one", beta_max=2.0),
    case(lengths=(70, 3), decay="underflow", num_writers=2, routing="gaps", initial=True),
    case(lengths=(70, 3), routing="one", weight_writes=False, weight_reads=False, decay="one"),
]


KDA_CASES = [
    case(lengths=(66, 1), num_partitions=2, num_readers=2, initial=True),
    case(lengths=(1, 1, 1), initial=True, num_partitions=1, beta_max=2.0),
    case(lengths=(20, 3), key_dim=12, value_dim=24, num_value_heads=2, num_partitions=0, beta_max=2.0, initial=True),
    case(lengths=(66,), key_dim=144, value_dim=8, num_partitions=0),
    case(lengths=(140,), num_partitions=0, decay="one", beta_max=2.0),
    case(lengths=(70, 3), num_partitions=2, decay="underflow", routing="gaps", initial=True),
]
CASES += [replace(case, recurrence="kda") for case in KDA_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case) -> None:
    actual = outputs_and_gradients(kernels, case, make_inputs(case).map(lambda x: x.float()))
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < TOLERANCE}
    assert not worst


@pytest.mark.parametrize("factor", [200.0, 1000.0])
def test_blocks_of_rows_that_forget_more_or_less(factor: float) -> None:
    """Blocks of 16 rows decay by exp(-3), and by more and less than the exp(-8) from which the kernels halve them."""
    case_ = case(recurrence="kda", lengths=(70,), num_partitions=0, initial=True)
    inputs = make_inputs(case_)
    inputs = replace(inputs, shared=replace(inputs.shared, g=inputs.shared.g * factor)).map(torch.clone)
    actual = outputs_and_gradients(kernels, case_, inputs.map(lambda x: x.float()))
    reference = outputs_and_gradients(oracle, case_, inputs)
    worst = {name: error for name, error in errors(actual, reference).items() if not error < TOLERANCE}
    assert not worst


@pytest.mark.parametrize("recurrence", ["gdn", "kda"])
def test_a_step_that_forgets_everything_has_no_gradient_of_its_decay(recurrence: str) -> None:
    """The gradient of a forgetting step's decay is exactly 0, since large parameters would multiply any rounding."""
    case_ = case(recurrence=recurrence, lengths=(150,), num_partitions=0, decay="underflow", initial=True)
    inputs = make_inputs(case_).map(lambda x: x.float())
    gradient = outputs_and_gradients(kernels, case_, inputs)["d shared.g"]
    forgets = inputs.shared.g == -2000
    assert forgets.any() and (gradient[forgets] == 0).all() and (gradient[~forgets] != 0).any()


def test_the_inverse_of_repeated_keys_with_negative_eigenvalues() -> None:
    """Repeating one key with beta 2 keeps (1 + L)^-1 small although powers of L reach 1e17."""
    num_tokens, tables = 64, torch.tensor([0])
    key = torch.nn.functional.normalize(torch.ones(num_tokens, 1, 16), dim=-1)
    zeros, twos, ones = torch.zeros(num_tokens, 1), torch.full((num_tokens, 1), 2.0), torch.ones(num_tokens)
    bank, rows = (key, key, zeros, twos), torch.arange(num_tokens, dtype=torch.int32)
    end = tables + num_tokens
    inputs = [*bank, *bank, key, ones, ones, ones, rows, rows, 0 * rows, tables, end, tables, end, tables]
    inverse, _, _ = gdn.gdn_prepare(inputs, num_tokens)
    expected = torch.linalg.inv(torch.eye(num_tokens) + 2 * torch.ones(num_tokens, num_tokens).tril(-1).double())
    assert rms(inverse[0] - expected) < 1e-5 * rms(expected)


def forget_a_gate_between_pieces(patch: pytest.MonkeyPatch, recurrence: str) -> None:
    operators = OPERATORS[recurrence]

    def wrong(*args):
        transition, increment = operators.summarize(*args)
        return torch.ones_like(transition), increment

    patch.setitem(OPERATORS, recurrence, operators._replace(summarize=wrong))


def swap_write_and_read(patch: pytest.MonkeyPatch, recurrence: str) -> None:
    fields = list(delta_rule.DeltaRuleInputs._fields)
    write, read = fields.index("write_R"), fields.index("read_R")
    fields[write], fields[read] = fields[read], fields[write]
    swapped = type(
        "Swapped", (delta_rule.DeltaRuleInputs,), {"_asdict": lambda self: dict(zip(fields, self, strict=True))}
    )
    for module in (delta_rule, {"gdn": gdn, "kda": kda}[recurrence]):
        patch.setattr(module, "DeltaRuleInputs", swapped)


def drop_the_leaving_gradient(patch: pytest.MonkeyPatch, recurrence: str) -> None:
    operators = OPERATORS[recurrence]

    def wrong(*args):
        return operators.attend_backward(*args[:-1], torch.zeros_like(args[-1]))

    patch.setitem(OPERATORS, recurrence, operators._replace(attend_backward=wrong))


@pytest.mark.parametrize("recurrence", ["gdn", "kda"])
@pytest.mark.parametrize("mutate", [forget_a_gate_between_pieces, swap_write_and_read, drop_the_leaving_gradient])
def test_a_seeded_bug_is_seen(mutate, recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case_ = case(recurrence=recurrence, lengths=(70,), num_partitions=2, num_readers=2)
    monkeypatch.setattr(sys.modules[__name__], "CHUNKS_PER_PIECE", 1)
    mutate(monkeypatch, recurrence)
    actual = outputs_and_gradients(kernels, case_, make_inputs(case_).map(lambda x: x.float()))
    assert max(errors(actual, expected(case_)).values()) > 1e-3
