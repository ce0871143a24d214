"""The tables that the kernels read equal the torch forms, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import routing
from megatron_sse.kernels.banks import Picks
from megatron_sse.kernels.resets import find_bad_rows
from megatron_sse.kernels.segments import Segments, Spans
from megatron_sse.kernels.triton.finite import keep_finite
from megatron_sse.kernels.triton_rows import Rows, Scales, lay_out, make_rows

CHUNKS_PER_PIECE = 2


def make_spans(lengths: tuple[int, ...], documents: bool) -> Spans:
    """Return spans of these lengths, with documents of 1 to 90 tokens, of which some cross the spans."""
    num_tokens = sum(lengths)
    span_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 90, (num_tokens,), generator=generator)
    document_T = torch.repeat_interleave(torch.arange(num_tokens), sizes)[:num_tokens]
    return Spans(offsets, span_T, document_T if documents else None)


def make_picks(num_tokens: int, num_partitions: int, num_picks: int) -> Picks:
    generator = torch.Generator().manual_seed(2)
    bank_TP = torch.rand(num_tokens, num_partitions, generator=generator).argsort(1)[:, :num_picks]
    # The last partition gets no pick: a segment that is empty.
    bank_TP = bank_TP % max(1, num_partitions - 1)
    scales = torch.rand(3, num_tokens, num_picks, generator=generator)
    return Picks(bank_TP, num_partitions, *scales, before_norm=False)


def expected(
    banks: list[Tensor], v: Tensor, picks: Picks | None, spans: Spans, delta_rule: bool
) -> tuple[Rows, Scales, Tensor]:
    """Do in torch what lay_out does."""
    num_tokens, num_picks = len(v), 0
    segments: Segments
    scales = [torch.ones(num_tokens)] * 3
    if picks is None:
        segments = spans.segments()
    else:
        num_picks = picks.bank_TP.shape[1]
        segments = routing.join_segments(picks.bank_TP, spans, picks.num_partitions)
        of_picks = (picks.writes, picks.write_scale, picks.read_scale)
        scales = [torch.cat((ones, x.flatten())) for ones, x in zip(scales, of_picks, strict=True)]
    spoiled = torch.zeros(num_tokens * (1 + num_picks), dtype=torch.bool)
    if segments.resets is not None:
        half = len(banks) // 2
        kinds = [find_bad_rows(bank[2], *bank[:2], v, *bank[3:]) for bank in (banks[:half], banks[half:])]
        bad_R = kinds[0] if picks is None else torch.cat((kinds[0], kinds[1].repeat_interleave(num_picks)))
        for scale in scales:
            bad_R = bad_R | ~scale.isfinite()
        resets = segments.resets.spoil(segments.by_position(bad_R), segments.offsets_S1)
        spoiled = resets.spoiled_R
        writes, write, read = (x.masked_fill(segments.by_row(spoiled), 0) for x in scales)
        if not delta_rule:
            writes = writes.masked_fill(segments.by_row(resets.starts_R), 0)
        segments, scales = replace(segments, resets=resets), [writes, write, read]
    return make_rows(segments, num_tokens, num_picks, CHUNKS_PER_PIECE), Scales(*scales), spoiled


def assert_equal(actual: object, wanted: object, name: str = "") -> None:
    if isinstance(wanted, Tensor):
        assert isinstance(actual, Tensor) and actual.dtype == wanted.dtype and torch.equal(actual, wanted), name
    elif hasattr(wanted, "__dict__") or isinstance(wanted, tuple):
        fields = wanted._fields if isinstance(wanted, tuple) else vars(wanted)
        for field in fields:
            assert_equal(getattr(actual, field), getattr(wanted, field), f"{name}.{field}")
    else:
        assert actual == wanted, name


def make_inputs(num_tokens: int, delta_rule: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    banks = [torch.randn(num_tokens, 2, 12, generator=generator) for _ in range(6)]
    if delta_rule:
        banks = [*banks[:2], banks[2][..., 0], banks[2][..., 1], *banks[3:5], banks[5][..., 0], banks[5][..., 1]]
    return banks, torch.randn(num_tokens, 2, 20, generator=generator)


def spoil(banks: list[Tensor], v: Tensor, picks: Picks | None) -> None:
    """Put in numbers that are not finite, or not quite; of log decays, -inf is allowed."""
    half = len(banks) // 2
    banks[0][70, 1, 3], banks[half + 1][40, 0, 11], v[130, 1, 19] = torch.nan, -torch.inf, 1e35
    banks[2][5], banks[2][150, 0], banks[half + 2][20, 1] = -torch.inf, torch.inf, torch.nan
    banks[-1][100, 0] = torch.inf
    if picks is not None:
        picks.write_scale[90, 0], picks.read_scale[91, -1] = torch.inf, torch.nan


CASES = [
    # Lengths of spans, partitions, picks, documents, delta rule.
    ((200,), 3, 1, True, False),
    ((150, 64, 130), 5, 2, True, True),
    ((170,), 0, 0, True, False),
    ((1, 70, 129), 4, 3, False, True),
    ((200,), 0, 0, False, False),
    ((5, 195), 70, 2, True, True),
]


@pytest.mark.parametrize("lengths, num_partitions, num_picks, documents, delta_rule", CASES, ids=str)
def test_rows_and_their_pieces(
    lengths: tuple[int, ...], num_partitions: int, num_picks: int, documents: bool, delta_rule: bool
) -> None:
    spans = make_spans(lengths, documents)
    picks = make_picks(sum(lengths), num_partitions, num_picks) if num_partitions else None
    banks, v = make_inputs(sum(lengths), delta_rule)
    for _ in range(2):
        arguments = banks, v, picks, spans
        actual = lay_out(*arguments, CHUNKS_PER_PIECE, delta_rule)
        wanted = expected(*arguments, delta_rule)
        for one, other, name in zip(actual[:2], wanted[:2], ("rows", "scales"), strict=True):
            assert_equal(one, other, name)
        if documents:
            assert torch.equal(actual[2], wanted[2])
            assert actual[2].any() == (_ == 1)
            spoil(banks, v, picks)


def test_gradients_of_scales() -> None:
    spans, picks = make_spans((200,), True), make_picks(200, 3, 2)
    banks, v = make_inputs(200, True)
    spoil(banks, v, None)
    leaves = [x.requires_grad_() for x in (picks.write_scale, picks.read_scale)]
    weight = torch.randn(2, 600, generator=torch.Generator().manual_seed(4))

    def gradients(scales: Scales) -> tuple[Tensor, ...]:
        return torch.autograd.grad((torch.stack(scales[1:]) * weight).sum(), leaves)

    _, actual, _ = lay_out(banks, v, picks, spans, CHUNKS_PER_PIECE, True)
    _, wanted, _ = expected(banks, v, picks, spans, True)
    assert all(map(torch.equal, gradients(actual), gradients(wanted)))


def test_states_that_are_not_finite() -> None:
    spans, picks = make_spans((150, 100), True), make_picks(250, 3, 2)
    rows, scales, spoiled_R = lay_out(*make_inputs(250, True), picks, spans, 1, True)
    spoiled_R[33] = True
    pieces, num_rows = rows.pieces, len(rows.row_R)
    entering = torch.randn(len(pieces.start_M), 3, 16, 20)
    bad = torch.zeros(len(entering), dtype=torch.bool)
    bad[1::3] = True
    entering[1::3, 1, 7, 5] = torch.inf
    entering[1, 1, 7, 5], entering[1, 2, 0, 0] = torch.nan, -torch.inf
    position = torch.arange(num_rows)
    piece = torch.searchsorted(pieces.end_M, position, right=True)
    run = torch.nn.functional.pad(rows.run_R, (1, 0))
    reads = run[position + 1] == run[pieces.start_M[piece]]
    spoiled = spoiled_R | (bad[piece] & reads)
    assert 0 < spoiled.sum() < num_rows and not reads.all()
    by_row = torch.zeros_like(spoiled).index_copy(0, rows.row_R.long(), spoiled)

    wanted = entering.masked_fill(bad[:, None, None, None], 0)
    tables = pieces.start_M, pieces.end_M, rows.row_R, rows.token_R, rows.run_R, spoiled_R
    token, read = keep_finite(entering, *tables, scales.read_R)
    assert torch.equal(entering, wanted)
    assert torch.equal(token, rows.token_R.masked_fill(spoiled, -1))
    torch.testing.assert_close(read, scales.read_R.masked_fill(by_row, torch.nan), rtol=0, atol=0, equal_nan=True)
