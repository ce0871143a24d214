import numpy as np
import pytest
import torch

from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard


def brute_force(starts_BL):
    """Find documents token by token."""
    documents, positions, offsets = [], [], []
    for row in starts_BL:
        for column, start in enumerate(row):
            if start or column == 0:
                offsets.append(len(documents))
            documents.append(len(offsets) - 1)
            positions.append(len(documents) - 1 - offsets[-1])
    return offsets + [len(documents)], documents, positions


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_from_starts_is_what_a_loop_finds(density):
    starts_BL = np.random.default_rng(0).random((3, 29)) < density
    layout = TokenLayout.from_starts(starts_BL)
    offsets, documents, positions = brute_force(starts_BL)
    assert layout.offsets_D1.tolist() == offsets
    assert layout.document_T.tolist() == documents
    assert layout.position_BL.flatten().tolist() == positions
    assert (layout.batch_size, layout.length, layout.num_documents) == (3, 29, len(offsets) - 1)
    assert layout.max_document == max(positions) + 1
    for tensor in (layout.offsets_D1, layout.document_T, layout.position_BL):
        assert tensor.dtype == torch.int64


def test_every_sequence_starts_a_document():
    layout = TokenLayout.from_starts(np.zeros((2, 5), dtype=bool))
    assert layout.offsets_D1.tolist() == [0, 5, 10]


def test_spans_do_not_depend_on_the_documents():
    """All tokens are one span, or each slot of each sequence with context ranks."""
    starts_BE = np.zeros((2, 8), dtype=bool)
    starts_BE[1, [2, 3, 6]] = True
    layout = TokenLayout.from_starts(starts_BE)
    assert layout.offsets_Y1.tolist() == [0, 16] and layout.span_T.tolist() == [0] * 16 and layout.edges is None
    layout = TokenLayout.from_starts(starts_BE, shard=ContextShard(0, 2, zigzag=True))
    assert layout.offsets_Y1.tolist() == [0, 2, 4, 6, 8] and layout.span_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # Slots hold the columns 0 1 | 6 7 of each sequence: the document of the first one fills its second slot (carries).
    edges = layout.edges
    assert edges.span_FB.tolist() == [[0, 2], [1, 3]]
    assert edges.continues_FB.tolist() == [[False, False], [True, False]]
    assert edges.carries_FB.tolist() == [[False, False], [True, False]]


def test_the_given_array_is_not_changed():
    starts_BL = np.zeros((2, 5), dtype=bool)
    TokenLayout.from_starts(starts_BL)
    assert not starts_BL.any()


def test_padding_is_kept():
    real_BL = np.array([[True, True, False]])
    layout = TokenLayout.from_starts(np.zeros((1, 3), dtype=bool), real_BL)
    assert layout.real_BL.tolist() == [[True, True, False]]
    assert TokenLayout.from_starts(np.zeros((1, 3), dtype=bool)).real_BL is None


def test_megatron_does_not_take_its_packed_path():
    layout = TokenLayout.from_starts(np.zeros((1, 3), dtype=bool))
    assert layout.qkv_format == "sbhd"
    assert layout.cu_seqlens_q is None


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 0)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="starts"):
        TokenLayout.from_starts(np.zeros(shape, dtype=bool))


def test_padding_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="real"):
        TokenLayout.from_starts(np.zeros((1, 3), dtype=bool), np.ones((1, 4), dtype=bool))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_chunks_of_queries_is_that_of_all_at_once(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, gradients and dropout; no mask is larger than allowed. Pieces without dropout give the same."""
    starts_BE = np.zeros((2, 24), dtype=bool)
    starts_BE[0, 7] = starts_BE[1, 20] = True
    layout = TokenLayout.from_starts(starts_BE)
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 2, 4, 3), (24, 2, 2, 3), (24, 2, 2, 3))
    qkv = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    masks: list[int] = []
    make = TokenLayout._mask
    monkeypatch.setattr(TokenLayout, "_mask", lambda *args: masks.append((made := make(*args)).numel()) or made)

    def with_gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return out, *torch.autograd.grad(out.square().sum() / 2, qkv)

    def attend(pairs: int, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr("megatron_sse.parallel.layout.MASKED_PAIRS", pairs)
        masks.clear()
        if dropout:
            return with_gradients(layout.attend(1, *qkv, window=window, scale=None, dropout=dropout, group=None))
        out = layout._attend_masked(*(x.permute(1, 2, 0, 3) for x in qkv), window, None, 0.0)
        return with_gradients(out.permute(2, 0, 1, 3).flatten(-2))

    whole = attend(2 * 24 * 24)
    assert masks == [2 * 24 * 24]
    chunks = attend(2 * 24 * 5)
    # Five chunks, each once more in the backward pass.
    assert len(masks) == 10 and max(masks) == 2 * 24 * 5
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(whole, chunks, strict=True))
    pieces = with_gradients(layout.attend(1, *qkv, window=window, scale=None, dropout=0.0, group=None))
    assert len(masks) == 10
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(whole, pieces, strict=True))
    # The output is linear in the values, so that the same are dropped both times.
    out, *_, grad_v = attend(2 * 24 * 5, dropout=0.4)
    assert (out - whole[0]).abs().max() > 0.1
    assert torch.allclose((grad_v * qkv[2]).sum(), out.square().sum())
