"""Gated linear attention's operators, with the scan between them, against the oracle."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import Routes
from megatron_sse.kernels.routing import sort_by_segment
from megatron_sse.kernels.scan import scan_states
from megatron_sse.kernels.segments import Segments
from megatron_sse.kernels.triton import gla
from megatron_sse.kernels.triton_rows import Rows, make_rows
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import oracle


class _Attention(torch.autograd.Function):
    """An operation that returns outputs by row and final states; torch does what operators leave to callers."""

    @staticmethod
    def forward(ctx, rows: Rows, q1, k1, g1, q2, k2, g2, v, writes, write, read, initial_S):
        pieces = rows.pieces
        inputs = (q1, k1, g1, q2, k2, g2, v, writes, write, read, *rows.tables, rows.num_tokens)
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x in gla.gla_summarize(*inputs)]
            if initial_S is not None:
                leaves.append(initial_S.detach().requires_grad_())
            entering_M, final_S = scan_states(*leaves[:2], pieces, leaves[2] if len(leaves) > 2 else None)
        ctx.saved = (rows, inputs, leaves, entering_M, final_S)
        return gla.gla_attend(*inputs, *gla.gla_prepare(*inputs), entering_M.detach()), final_S.detach()

    @staticmethod
    def backward(ctx, grad_o_R, grad_final_S):
        rows, inputs, leaves, entering_M, final_S = ctx.saved
        grad_entering_M = gla.gla_summarize_backward(*inputs, grad_o_R)
        grad_outputs = (grad_entering_M, grad_final_S)
        _, grad_leaving_M, *grad_initial = torch.autograd.grad((entering_M, final_S), leaves, grad_outputs)
        again = gla.gla_again(*inputs, entering_M.detach())
        *grads, dv_R, dwrite_R, dread_R = gla.gla_attend_backward(*inputs, *again, grad_o_R, grad_leaving_M)
        num_tokens = rows.num_tokens
        shared = [x[:num_tokens] for x in grads]
        sparse = [_sum_picks(x, num_tokens) for x in grads]
        dv = dv_R[:num_tokens] + _sum_picks(dv_R, num_tokens)
        return None, *shared, *sparse, dv, None, dwrite_R, dread_R, *(grad_initial or [None])


def _sum_picks(x_R: Tensor, num_tokens: int) -> Tensor:
    return x_R[num_tokens:].unflatten(0, (num_tokens, -1)).sum(1) if len(x_R) > num_tokens else 0 * x_R


def triton_attention(chunks_per_piece: int, form: str = "varlen") -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an implementation on the kernels; its mask form has a row for every partition of every token."""

    def function(inputs: Inputs, routes: Routes | None, *, weight_writes, weight_reads, initial_DAHKV, gate):
        num_tokens, num_documents = len(inputs.document_T), len(inputs.offsets_D1) - 1
        ones_T = torch.ones(num_tokens)
        writes_R = write_R = read_R = ones_T
        segments, num_picks = Segments(inputs.offsets_D1), 0
        initial_S = None if initial_DAHKV is None else initial_DAHKV[:, 0]
        if routes is not None:
            scales = [routes.write_weight_TP(False), routes.write_weight_TP(weight_writes)]
            scales.append(routes.read_weight_TP(weight_reads))
            bank_TP = routes.bank_TP
            if form == "mask":
                scales = [routes.scatter(x.float()) for x in scales]
                bank_TP = torch.arange(routes.num_partitions).expand(num_tokens, -1)
            num_picks = bank_TP.shape[1]
            writes_R, write_R, read_R = (torch.cat((ones_T, x.flatten().float())) for x in scales)
            order, offsets = sort_by_segment(bank_TP, inputs.document_T, num_documents, routes.num_partitions)
            offsets = torch.cat((inputs.offsets_D1, num_tokens + offsets[1:]))
            segments = Segments(offsets, torch.cat((torch.arange(num_tokens), num_tokens + order)))
            if initial_DAHKV is not None:
                initial_S = torch.cat((initial_DAHKV[:, 0], initial_DAHKV[:, 1:].flatten(0, 1)))
        rows = make_rows(segments, num_tokens, num_picks, chunks_per_piece)
        shared, sparse = inputs.shared, inputs.sparse or inputs.shared
        banks = (shared.q_THK, shared.k_THK, shared.g, sparse.q_THK, sparse.k_THK, sparse.g)
        o_R, final_S = _Attention.apply(rows, *banks, inputs.v_THV, writes_R.detach(), write_R, read_R, initial_S)
        o = o_R[:num_tokens] + _sum_picks(o_R, num_tokens)
        final_sparse = (
            final_S[num_documents:].unflatten(0, (num_documents, -1)) if num_picks else final_S[:, None][:, :0]
        )
        return o, torch.cat((final_S[:num_documents, None], final_sparse), dim=1)

    return function


def steepen(inputs: Inputs, factor: float) -> Inputs:
    banks = [bank and replace(bank, g=bank.g.detach() * factor) for bank in (inputs.shared, inputs.sparse)]
    return replace(inputs, shared=banks[0], sparse=banks[1]).map(torch.clone)


def compare(case: Case, chunks_per_piece: int = 1, form: str = "varlen", factor: float = 1.0) -> dict[str, float]:
    """Return the fp32 errors of outputs, final states and all gradients."""
    inputs = steepen(make_inputs(case), factor)
    expected = outputs_and_gradients(oracle, case, inputs)
    attention = triton_attention(chunks_per_piece, form)
    return errors(outputs_and_gradients(attention, case, inputs.map(lambda x: x.float())), expected)


SEVERAL = Case(
    lengths=(1, 66),
    num_heads=1,
    num_value_heads=2,
    key_dim=24,
    value_dim=48,
    num_partitions=5,
    num_writers=2,
    num_readers=3,
    initial=True,
)
ALONE = Case(lengths=(1, 150), num_heads=1, num_value_heads=1, key_dim=16, value_dim=20, num_partitions=0)
FEW = Case(lengths=(3, 66), num_heads=1, num_value_heads=1, key_dim=16, value_dim=32, num_partitions=3, num_readers=2)
SMALL = replace(FEW, lengths=(1, 20), num_partitions=2, initial=True)


@pytest.mark.parametrize(
    "case, chunks_per_piece, form, factor",
    [
        (replace(SEVERAL, decay="underflow", routing="gaps"), 2, "varlen", 1.0),
        # Some chunks decay by more than exp(-8), some by less.
        (replace(ALONE, initial=True, num_heads=2, num_value_heads=2), 2, "varlen", 50.0),
        (replace(ALONE, decay="one", lengths=(200,)), 1, "varlen", 1.0),
        (replace(ALONE, decay="underflow", initial=True), 1, "varlen", 1.0),
        # Decays of exp(-20) per chunk and exp(-5) per 16 rows lie between the kernels' cases.
        (replace(FEW, routing="one"), 4, "varlen", 200.0),
        (replace(FEW, num_readers=1), 1, "mask", 1.0),
        (replace(ALONE, key_dim=80, value_dim=144, lengths=(65,), initial=True), 1, "varlen", 200.0),
    ],
    ids=str,
)
def test_matches_the_oracle(case: Case, chunks_per_piece: int, form: str, factor: float) -> None:
    # Three times the measured error (3e-7).
    worst = {name: error for name, error in compare(case, chunks_per_piece, form, factor).items() if not error < 1e-6}
    assert not worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Inputs as in training: queries, keys and values in 16 bits, gates and router in fp32."""
    rounded = make_inputs(SMALL).map(lambda x: x.to(dtype).double())
    mixed = rounded.map(lambda x: x.float())
    for bank in (mixed.shared, mixed.sparse):
        bank.q_THK.data, bank.k_THK.data = bank.q_THK.data.to(dtype), bank.k_THK.data.to(dtype)
    mixed.v_THV.data = mixed.v_THV.data.to(dtype)
    expected = outputs_and_gradients(oracle, SMALL, rounded)
    actual = outputs_and_gradients(triton_attention(1), SMALL, mixed)
    assert actual["o"].dtype == actual["d v"].dtype == actual["d sparse.k"].dtype == dtype
    assert actual["final"].dtype == actual["d shared.g"].dtype == torch.float32
    worst = {name: e for name, e in errors(actual, expected).items() if not e < 2 * torch.finfo(dtype).eps}
    assert not worst


def all_rows_write(kernel, x: dict) -> dict:
    return x | {"writes": torch.ones_like(x["writes"])}


def only_the_shared_bank(kernel, x: dict) -> dict:
    return x | {"num_tokens": len(x["row"])}


def first_chunk_of_all_pieces(kernel, x: dict) -> dict:
    return x | {"chunk": torch.zeros_like(x["chunk"])}


def steep_chunks_as_mild(kernel, x: dict) -> dict:
    return x | (
        {"steep": torch.zeros_like(x["steep"])} if "steep" in x and kernel is not gla.gla_prepare_kernel else {}
    )


def no_scale_of_reads(kernel, x: dict) -> dict:
    return x | {"read": torch.ones_like(x["read"])}


def forget_the_leaving_gradient(kernel, x: dict) -> dict:
    return x | ({"grad_leaving": torch.zeros_like(x["grad_leaving"])} if kernel is gla.gla_values_kernel else {})


def nothing_passes_through(kernel, x: dict) -> dict:
    return x | ({"through": torch.zeros_like(x["through"])} if kernel is gla.gla_intra_kernel else {})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "mutate",
    [
        all_rows_write,
        only_the_shared_bank,
        first_chunk_of_all_pieces,
        steep_chunks_as_mild,
        no_scale_of_reads,
        forget_the_leaving_gradient,
        nothing_passes_through,
    ],
)
def test_a_seeded_bug_is_seen(mutate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL
    if mutate is steep_chunks_as_mild:
        case = replace(case, decay="underflow")
    launch = gla._launch
    monkeypatch.setattr(
        gla, "_launch", lambda kernel, places, x, **rest: launch(kernel, places, mutate(kernel, x), **rest)
    )
    assert not max(compare(case).values()) < 1e-3


def test_operators_are_registered() -> None:
    """Schemas and fake outputs of the operators agree with their real behaviour."""
    rows = make_rows(Segments(torch.tensor([0, 3])), 3, 0, 1)
    key, value, ones = torch.randn(3, 1, 16), torch.randn(3, 1, 20), torch.ones(3)
    inputs = (*(key, key, -key.abs()) * 2, value, ones, ones, ones, *rows.tables, 3)
    states = torch.randn(len(rows.pieces.start_M), 1, 16, 20)
    prepared = gla.gla_prepare(*inputs)
    for operator, rest in (
        (gla.gla_summarize, ()),
        (gla.gla_prepare, ()),
        (gla.gla_attend, (*prepared, states)),
        (gla.gla_chunk_states, (*prepared, states)),
        (gla.gla_summarize_backward, (value,)),
        (gla.gla_attend_backward, (*prepared, states, value, states)),
    ):
        torch.library.opcheck(operator, (*inputs, *rest), test_utils=("test_schema", "test_faketensor"))
