"""The delta rule's kernels, with the scan over pieces between them, against the oracle: every output and gradient."""

from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import Routes
from megatron_sse.kernels.routing import sort_by_segment
from megatron_sse.kernels.scan import scan_states
from megatron_sse.kernels.segments import Segments
from megatron_sse.kernels.triton import gdn
from megatron_sse.kernels.triton.rows import Rows, make_rows
from tests.kernels.cases import UNEVEN, Case, Inputs, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import oracle

CHUNKS_PER_PIECE = 2


class _Attend(torch.autograd.Function):
    """Tokens' inputs in, rows' outputs and the segments' final states out."""

    @staticmethod
    def forward(ctx, rows: Rows, writes_R, initial, write_R, read_R, *tensors):
        tables = (rows.row_R, rows.token_R, rows.chunks.start_G, rows.chunks.end_G)
        tables += (rows.pieces.start_G, rows.pieces.end_G, rows.chunk_M)
        inputs = [*tensors, writes_R, write_R, read_R, *tables]
        prepared = gdn.gdn_prepare(inputs, rows.num_tokens)
        transition, increment = gdn.gdn_summarize(inputs, rows.num_tokens, prepared)
        entering, final = scan_states(transition, increment, rows.pieces, initial)
        ctx.rows, ctx.kept = rows, (inputs, prepared, transition, increment, entering, initial)
        return gdn.gdn_attend(inputs, rows.num_tokens, prepared, entering), final

    @staticmethod
    def backward(ctx, grad_o, grad_final):
        rows, (inputs, prepared, transition, increment, entering, initial) = ctx.rows, ctx.kept
        arguments = (inputs, rows.num_tokens, prepared)
        with torch.enable_grad():
            leaves = [increment.requires_grad_(), initial.requires_grad_()]
            states = scan_states(transition, increment, rows.pieces, initial)
        grad_states = gdn.gdn_summarize_backward(*arguments, grad_o), grad_final
        grad_leaving, grad_initial = torch.autograd.grad(states, leaves, grad_states)
        *by_row, grad_write, grad_read = gdn.gdn_attend_backward(*arguments, entering, grad_o, grad_leaving)
        shared, sparse = ([x[:, 0] for x in by_row], [x[:, 1:].sum(1) for x in by_row])
        by_row = [x.unflatten(0, (-1, 1)) for x in by_row]
        shared = [x[: rows.num_tokens].flatten(0, 1) for x in by_row]
        sparse = [x[rows.num_tokens :].view(rows.num_tokens, -1, *x.shape[2:]).sum(1) for x in by_row]
        grads = *shared[:4], *sparse[:4], shared[4] + sparse[4]
        return None, None, grad_initial, grad_write, grad_read, *grads


def kernels(inputs: Inputs, routes: Routes | None, weight_writes, weight_reads, gate, initial_DBHKV):
    """As tests.kernels.implementations.attention, through the kernels."""
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
    if initial_DBHKV is not None:
        initial = torch.cat((initial_DBHKV[:, 0], initial_DBHKV[:, 1:].flatten(0, 1)))
    banks = [x for bank in (shared, sparse) for x in (bank.q_THK, bank.k_THK, bank.g, bank.beta_TH)]
    banks = [x.to(inputs.v_THV.dtype) if x.dim() == 3 else x for x in banks]
    o_R, final = _Attend.apply(rows, writes_R, initial, write_R, read_R, *banks, inputs.v_THV)
    o = o_R[:num_tokens] + o_R[num_tokens:].view(num_tokens, -1, num_heads, value_dim).sum(1)
    final_sparse = final[num_documents:].view(num_documents, -1, *final.shape[1:])
    return o, torch.cat((final[:num_documents, None], final_sparse), 1)


def case(**options) -> Case:
    return Case(recurrence="gdn", **{"key_dim": 16, "value_dim": 16, "num_heads": 1, "num_value_heads": 1} | options)


@cache
def expected(case: Case) -> dict[str, Tensor]:
    return outputs_and_gradients(oracle, case, make_inputs(case))


CASES = [
    case(lengths=(150, 1, 64), num_partitions=5, num_writers=2, num_readers=3, initial=True),
    case(lengths=(1, 1, 1), initial=True, beta_max=2.0),
    case(lengths=(70, 3), value_dim=32, num_heads=2, num_value_heads=4, num_readers=2),
    case(lengths=(70, 3), key_dim=24, value_dim=40, num_value_heads=2, beta_max=2.0, initial=True),
    case(lengths=UNEVEN, num_partitions=0, initial=True),
    case(lengths=(300,), num_partitions=0, num_value_heads=2, decay="one", beta_max=2.0),
    case(lengths=(150, 3), decay="underflow", num_writers=2, routing="gaps", initial=True),
    case(lengths=(150, 3), routing="one", weight_writes=False, weight_reads=False, decay="one"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case) -> None:
    actual = outputs_and_gradients(kernels, case, make_inputs(case).map(lambda x: x.float()))
    worst = {name: error for name, error in errors(actual, expected(case)).items() if not error < 1e-5}
    assert not worst
