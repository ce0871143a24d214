"""Softmax attention on parts of sequences has the outputs and gradients of one rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_sse.model import attention
from megatron_sse.model.attention import TorchAttention
from megatron_sse.parallel import routes, zigzag
from tests.model.attention_runs import NUM_HEADS, Case, calls_of, run_attention, traffic_of
from tests.model.documented_attention import DocumentedTEAttention
from tests.model.mixer_runs import Results, worst_error
from tests.model.support import HIDDEN
from tests.parallel.zigzag_cases import PADDING, rows_after, rows_before
from tests.workers import run_workers

TOLERANCE = 1e-12
# 48 tokens in parts of 24 to 12; some documents are shorter than the number of chunks they are cut into.
DOCUMENTS = {
    "one": ((48,), (48,)),
    "over three ranks": ((13, 22, 13), (48,)),
    "edges on ranks": ((6, 6, 12, 24), (24, 24)),
    "many": ((1, 2, 3, 5, 7, 11, 13, 6),),
    "a token each": ((1,) * 48,),
}
CASES = {
    **{name: Case(lengths) for name, lengths in DOCUMENTS.items()},
    "window": Case(DOCUMENTS["over three ranks"], window=9),
    "window, one document": Case(DOCUMENTS["one"], window=15),
    "qk norm, all heads": Case(DOCUMENTS["many"], qk_norm=True, num_kv_heads=NUM_HEADS),
    "no rotary": Case(DOCUMENTS["edges on ranks"], rotary_base=0.0),
    "one key head": Case(DOCUMENTS["over three ranks"], num_kv_heads=1),
}
# Contiguous parts have 9 tokens, and 8 chunks do not divide the sequence.
ODD = Case(((36,), (36,)), window=20)
CORES = [TorchAttention, DocumentedTEAttention]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Results]:
    [results] = run_workers(1, run_attention, [*CASES.values(), ODD], TorchAttention)
    return dict(zip([*CASES, "odd"], results, strict=True))


def compare(by_rank: list[list[Results]], expected: dict[str, Results]) -> None:
    for number, name in enumerate(CASES):
        error, tensor = worst_error([results[number] for results in by_rank], expected[name])
        assert error < TOLERANCE, (name, tensor)


def test_torch_is_what_is_documented(one_rank: dict[str, Results]) -> None:
    compare(run_workers(1, run_attention, list(CASES.values()), DocumentedTEAttention), one_rank)


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("core", CORES)
def test_like_one_rank(core: type, size: int, zigzag: bool, one_rank: dict[str, Results]) -> None:
    compare(run_workers(size, run_attention, list(CASES.values()), core, size, False, zigzag), one_rank)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("core", CORES)
def test_beside_tensor_parallelism(core: type, sequence: bool, one_rank: dict[str, Results]) -> None:
    compare(run_workers(4, run_attention, list(CASES.values()), core, 2, sequence, False), one_rank)


@pytest.mark.parametrize("core", CORES)
def test_sequences_that_2p_does_not_divide(core: type, one_rank: dict[str, Results]) -> None:
    by_rank = run_workers(4, run_attention, [ODD], core, 4)
    assert worst_error([results for [results] in by_rank], one_rank["odd"])[0] < TOLERANCE


def forget_positions(patch: pytest.MonkeyPatch) -> None:
    """Keep the rotary angles of the original order."""
    original = attention.SoftmaxAttention._attend

    def wrong(self, hidden_states, layout):
        if isinstance(layout, zigzag.ZigzagLayout):
            numbers = torch.arange(layout.position_BL.shape[1])
            layout = replace(layout, position_BL=numbers.expand_as(layout.position_BL))
        return original(self, hidden_states, layout)

    patch.setattr(attention.SoftmaxAttention, "_attend", wrong)


def keep_padding(patch: pytest.MonkeyPatch) -> None:
    """Leave ones in padding rows, in the forward and the backward exchange."""
    original = routes._exchange

    def wrong(x_Rc, route, group):
        out = original(x_Rc, route, group)
        padding = torch.ones(len(out), dtype=torch.bool).index_fill_(0, route.receive_rows, False)
        return out.masked_fill_(padding[:, None], 1.0)

    patch.setattr(routes, "_exchange", wrong)


def forget_zigzag(patch: pytest.MonkeyPatch) -> None:
    """Give ranks contiguous parts of the padded documents."""
    original = zigzag._document_rows

    def wrong(lengths_D, padded_D, size):
        return [np.split(whole, size) for [whole] in original(lengths_D, padded_D, 1)]

    patch.setattr(zigzag, "_document_rows", wrong)


@pytest.mark.parametrize(
    ("mutation", "case"),
    [
        (forget_positions, "one"),
        (forget_positions, "many"),
        (keep_padding, "over three ranks"),
        (forget_zigzag, "over three ranks"),
    ],
)
def test_seeded_bugs_are_seen(mutation, case: str, one_rank: dict[str, Results]) -> None:
    by_rank = run_workers(2, run_attention, [CASES[case]], DocumentedTEAttention, 2, False, False, mutation)
    error, _ = worst_error([results for [results] in by_rank], one_rank[case])
    assert error > 1e-3


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize(("world_size", "sequence"), [(2, False), (4, False), (4, True)])
def test_packed_documents_as_transformer_engine_takes_them(world_size: int, sequence: bool, zigzag: bool) -> None:
    case = Case(((5, 11), (16,)))
    for [call] in run_workers(world_size, calls_of, case, DocumentedTEAttention, 2, sequence, zigzag):
        # On 2 ranks lengths 5, 11 and 16 are padded to multiples of 4; due to the padding an empty document follows.
        assert call["shape"] == (20, NUM_HEADS * 2 // world_size, case.head_dim)
        assert call["mask"] is AttnMaskType.padding_causal and call["kind"] == "a2a"
        documents = call["documents"]
        assert documents.qkv_format == "thd"
        assert documents.cu_seqlens_q.tolist() == documents.cu_seqlens_kv.tolist() == [0, 5, 16, 32, 32]
        assert documents.cu_seqlens_q_padded.tolist() == documents.cu_seqlens_kv_padded.tolist() == [0, 8, 20, 36, 40]
        assert documents.cu_seqlens_q.dtype == documents.cu_seqlens_q_padded.dtype == torch.int32
        assert documents.max_seqlen_q == documents.max_seqlen_kv == 16
        # Calls name no context group: the layer's own is used.
        assert documents.cp_group is None and documents.local_cp_size is None


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
def test_whole_sequences_as_transformer_engine_takes_them(zigzag: bool) -> None:
    for [call] in run_workers(2, calls_of, Case(((16,), (16,), (16,))), DocumentedTEAttention, 2, False, zigzag):
        assert call["shape"] == (8, 3, NUM_HEADS, Case.head_dim)
        assert call["mask"] is AttnMaskType.causal and call["documents"] is None


def test_one_rank_has_no_padding() -> None:
    [[call]] = run_workers(1, calls_of, Case(((5, 11), (16,))), DocumentedTEAttention, 1, False, False)
    assert call["shape"] == (32, NUM_HEADS, Case.head_dim) and call["mask"] is AttnMaskType.padding_causal
    assert call["documents"].cu_seqlens_q.tolist() == [0, 5, 16, 32]
    assert call["documents"].cu_seqlens_q_padded is None and call["documents"].max_seqlen_q == 16


def test_sequences_of_one_document_are_not_packed() -> None:
    """In the packed form cuDNN's attention would need Hopper."""
    [[call]] = run_workers(1, calls_of, Case(((16,), (16,))), DocumentedTEAttention, 1, False, False)
    assert call["documents"] is None and call["mask"] is AttnMaskType.causal and call["shape"][:2] == (16, 2)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_hidden_states_are_what_is_sent(sequence: bool) -> None:
    """Each token is sent once to the rank that needs it, by the tensor rank that holds it, and once back."""
    lengths = [[5, 11], [16]]
    before = rows_before(lengths, 2, 2 if sequence else 1, False)
    after = rows_after(lengths, 2, 2 if sequence else 1)
    case = Case(tuple(map(tuple, lengths)))
    for rank, traffic in enumerate(run_workers(4, traffic_of, case, DocumentedTEAttention, 2, sequence)):
        own, wanted = (set(rows[rank if sequence else rank // 2]) - {PADDING} for rows in (before, after))
        assert traffic.calls["alltoall_base_"] == 4
        assert traffic.sent["alltoall_base_"] == 8 * HIDDEN * 2 * (len(own - wanted) + len(wanted - own))


def test_torch_does_not_ask_for_zigzag() -> None:
    case = Case(DOCUMENTS["many"])
    for traffic in run_workers(2, traffic_of, case, TorchAttention, 2, False):
        assert traffic.calls["alltoall_base_"] == 0
