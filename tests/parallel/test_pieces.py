"""Pieces of softmax attention: which keys each query sees, and attention over them against scores with a mask."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.kernels.attention import Piece, attend_last, attend_pieces
from megatron_sse.parallel import pieces
from megatron_sse.parallel.sharding import ContextShard

STARTS_BE = np.zeros((2, 24), dtype=bool)
STARTS_BE[:, 0] = STARTS_BE[0, 7] = STARTS_BE[0, 8] = STARTS_BE[1, 20] = True
SHARDS = [ContextShard(), *(ContextShard(rank, 3, zigzag) for rank, zigzag in product(range(3), (False, True)))]


def seen_pairs(starts_BE: np.ndarray, shard: ContextShard, window: int | None) -> np.ndarray:
    """Return which columns of a sequence each of the rank's queries sees, [B, L, E], pair by pair."""
    document_BE = np.cumsum(starts_BE, axis=1)
    columns = shard.columns(starts_BE.shape[1])
    return np.array(
        [
            [
                [e <= c and ids[e] == ids[c] and (window is None or c - e < window) for e in range(len(ids))]
                for c in columns
            ]
            for ids in document_BE
        ]
    )


def attend_by_scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return (q @ k.mT * 0.3).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("starts_BE", [STARTS_BE, STARTS_BE[:1].repeat(2, axis=0)], ids=["different", "equal"])
@pytest.mark.parametrize("window", [None, 1, 5, 24])
def test_like_scores_with_a_mask(starts_BE: np.ndarray, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients on every rank, with fewer heads of keys and pieces that a window cuts."""
    monkeypatch.setattr(pieces, "WINDOWED_QUERIES", 3)
    generator = torch.Generator().manual_seed(1)
    for shard in SHARDS:
        seen = torch.from_numpy(seen_pairs(starts_BE, shard, window))
        shapes = ((2, 4, seen.shape[1], 8), (2, 2, 24, 8), (2, 2, 24, 8))
        qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
        wanted = attend_by_scores(*qkv, seen)
        grad_o = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
        got = attend_pieces(*qkv, pieces.cut_pieces(starts_BE, shard, window), window, 0.3)
        pairs = zip(
            (wanted, *torch.autograd.grad(wanted, qkv, grad_o)),
            (got, *torch.autograd.grad(got, qkv, grad_o)),
            strict=True,
        )
        # Off by up to 9e-16.
        assert all((x - y).abs().max() < 1e-13 for x, y in pairs)


def test_any_strides() -> None:
    """The kernels take the last dim to be in one piece."""
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(2, 2, 8, 24, generator=generator).transpose(2, 3).requires_grad_() for _ in range(3)]
    rows = [x.detach().contiguous().requires_grad_() for x in qkv]
    results = []
    for inputs in (qkv, rows):
        out = attend_pieces(*inputs, pieces.cut_pieces(STARTS_BE, ContextShard(), None))
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    last = [attend_last(q.detach()[:, :, 20:], k.detach(), v.detach()) for q, k, v in (qkv, rows)]
    assert torch.equal(*last)


def test_a_piece_for_each_document_or_window() -> None:
    both, alone = slice(None), slice(0, 1)
    second = pieces.cut_pieces(STARTS_BE[1:], ContextShard(), None)
    assert second == [Piece(both, slice(0, 20), slice(0, 20)), Piece(both, slice(20, 24), slice(20, 24))]
    first = pieces.cut_pieces(STARTS_BE, ContextShard(1, 2), None)[0]
    assert first == Piece(alone, slice(0, 12), slice(8, 24))
    long = pieces.cut_pieces(np.zeros((1, 400), dtype=bool), ContextShard(), 130)
    ends = [(piece.queries.stop, piece.keys.start, piece.hides(130)) for piece in long]
    assert ends == [(130, 0, False), (260, 1, True), (390, 131, True), (400, 261, True)]
    # No mask is larger than allowed, and nothing is cut that the window does not.
    cut = pieces.cut_pieces(np.zeros((1, 1 << 16), dtype=bool), ContextShard(), 1 << 14)
    sizes = [(piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start) for piece in cut]
    assert max(sizes) <= pieces.WINDOWED_PAIRS and len(cut) == 512
    assert len(pieces.cut_pieces(np.zeros((1, 1 << 14), dtype=bool), ContextShard(), 1 << 14)) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_document(value: float) -> None:
    generator = torch.Generator().manual_seed(2)
    qkv = [torch.randn(2, 2, 24, 8, generator=generator) for _ in range(3)]
    cut: Any = pieces.cut_pieces(STARTS_BE, ContextShard(), None)
    clean = attend_pieces(*qkv, cut)
    for x in qkv:
        x[0, :, 7] = value
        x.requires_grad_()
    out = attend_pieces(*qkv, cut)
    others = torch.arange(24) != 7
    assert not out[0, :, 7].isfinite().any()
    assert torch.equal(out[0][:, others], clean[0][:, others]) and torch.equal(out[1], clean[1])
    for grad in torch.autograd.grad(out, qkv, torch.ones_like(out)):
        assert grad[0][:, others].isfinite().all() and grad[1].isfinite().all()
