"""The scan's kernels and gradients, against the torch form in fp64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import scan
from megatron_sse.kernels.resets import PieceResets
from megatron_sse.kernels.segments import Pieces, Segments, cut
from megatron_sse.kernels.triton.scan import run_scan
from tests.kernels.cases import rms

SIZES, PIECE, H, V = (0, 9, 2, 0, 4, 13, 0), 4, 2, 21


def make_pieces() -> Pieces:
    offsets = torch.nn.functional.pad(torch.tensor(SIZES).cumsum(0), (1, 0))
    return cut(Segments(offsets), sum(SIZES), PIECE)


def make_leaves(pieces: Pieces, key_dim: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_pieces, num_segments = len(pieces.segment_M), len(SIZES)
    shapes = [(num_pieces, H, key_dim, columns), (num_pieces, H, key_dim, V), (num_segments, H, key_dim, V)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator) / max(1, columns / 8) ** 0.5 for shape in shapes
    ]


def outputs_and_gradients(leaves: list[Tensor], pieces: Pieces, with_initial: bool) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = scan.scan_states(leaves[0], leaves[1], pieces, leaves[2] if with_initial else None)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outputs]
    used = sum(-(-size // PIECE) for size in SIZES)
    loss = (outputs[0] * weights[0])[:used].sum() + (outputs[1] * weights[1]).sum()
    gradients = torch.autograd.grad(loss, leaves if with_initial else leaves[:2])
    return [outputs[0][:used], outputs[1], *(x[:used] for x in gradients[:2]), *gradients[2:]]


def error(key_dim: int, columns: int, with_initial: bool, patch: pytest.MonkeyPatch, pieces: Pieces) -> float:
    leaves = make_leaves(pieces, key_dim, columns)
    expected = outputs_and_gradients(leaves, make_pieces(), with_initial)
    patch.setattr(scan, "_run_torch", run_scan)
    actual = outputs_and_gradients([x.float() for x in leaves], pieces, with_initial)
    return max(rms(a - e) / rms(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("key_dim, columns", [(5, 1), (64, 1), (6, 6), (80, 80)])
def test_scan(key_dim: int, columns: int, with_initial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(key_dim, columns, with_initial, monkeypatch, make_pieces()) < 1e-6


@pytest.mark.parametrize("columns", [1, 6])
def test_unused_pieces_are_zero(columns: int) -> None:
    pieces = make_pieces()
    transition, increment, initial = (x.float() for x in make_leaves(pieces, 6, columns))
    used = sum(-(-size // PIECE) for size in SIZES)
    transition[used:], increment[used:] = torch.nan, torch.nan
    for reverse in (False, True):
        entering, final = run_scan(transition, increment, initial, pieces, reverse)
        assert used < len(entering) and entering[used:].count_nonzero() == 0
        assert entering.isfinite().all() and final.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("columns", [1, 6])
def test_what_is_not_finite_ends_where_a_document_starts(columns: int, reverse: bool) -> None:
    pieces = make_pieces()
    inside_M = pieces.step_M == 1
    pieces = replace(pieces, resets=PieceResets(inside_M, inside_M, *[pieces.empty_S] * 3))
    transition, increment, initial = (x.float() for x in make_leaves(pieces, 6, columns))
    used = sum(-(-size // PIECE) for size in SIZES)
    expected, expected_final = run_scan(transition, increment, initial, pieces, reverse)
    # In reverse order the pieces before the reset follow it.
    behind_M = (pieces.step_M < 1) if reverse else (pieces.step_M > 1)
    behind_M[used:] = False
    many_S = (pieces.last_S > pieces.first_S) & ~pieces.empty_S
    behind_M &= many_S[pieces.segment_M]
    actual, final = run_scan(transition, increment, torch.full_like(initial, torch.inf), pieces, reverse)
    assert behind_M.any() and torch.equal(actual[behind_M], expected[behind_M])
    assert torch.equal(final[many_S], expected_final[many_S])
    assert not final[~many_S].isfinite().any()


@pytest.mark.parametrize("columns", [1, 6])
def test_one_piece_too_few_is_seen(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = make_pieces()
    wrong = replace(pieces, last_S=(pieces.last_S - 1).clamp(min=0))
    assert error(6, columns, True, monkeypatch, wrong) > 1e-2
