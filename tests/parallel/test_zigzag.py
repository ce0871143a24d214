"""Zigzag micro-batches as Transformer Engine documents them: thd_get_partitioned_indices and cu_seqlens."""

from itertools import pairwise

import pytest

from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.parallel.zigzag import ZigzagLayout
from tests.parallel.zigzag_cases import BATCHES, PADDING, is_packed, rows_after, starts_of


def make(lengths: list[list[int]], rank: int, size: int, tensor_rank: int = 0, tensor_size: int = 1) -> ZigzagLayout:
    shard = ContextShard(rank, size)
    return ZigzagLayout.from_starts(starts_of(lengths), shard, tensor_rank, tensor_size, "cpu")


def partitioned_indices(padded: list[int], total: int, size: int, rank: int) -> list[int]:
    """Return what Transformer Engine's thd_get_partitioned_indices computes."""
    local = [offset // size for offset in padded]
    indices = []
    for token in range(total // size):
        document = max(d for d in range(len(local) - 1) if local[d] <= token)
        length = local[document + 1] - local[document]
        index = token - local[document]
        chunk = rank if index < length // 2 else 2 * (size - 1) - rank
        indices.append(index + local[document] * size + length // 2 * chunk)
    return indices


@pytest.mark.parametrize("tensor_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_documents(name: str, size: int, tensor_size: int) -> None:
    lengths = BATCHES[name]
    for rank in range(size):
        zigzag = make(lengths, rank, size, 0, tensor_size)
        own = rows_after(lengths, size, tensor_size)[rank * tensor_size :][:tensor_size]
        rows = [token for part in own for token in part]
        assert zigzag.position_BL.numel() == len(rows)
        if is_packed(lengths, size):
            check_documents(lengths, zigzag, rows, size, rank)
        else:
            assert zigzag.documents is None


def check_documents(lengths: list[list[int]], zigzag: ZigzagLayout, rows: list[int], size: int, rank: int) -> None:
    real, padded = (x.tolist() for x in (zigzag.documents.cu_seqlens_q, zigzag.documents.cu_seqlens_q_padded))
    sizes, places = ([end - start for start, end in pairwise(offsets)] for offsets in (real, padded))
    whole = [number for documents in lengths for number in documents]
    assert [number for number in sizes if number] == whole
    assert all(place % (2 * size) == 0 for place in places)
    assert all(number <= place < number + 2 * size for number, place in zip(whole, places, strict=False))
    assert zigzag.documents.max_seqlen_q == zigzag.documents.max_seqlen_kv == max(places)
    token_E, position_E = [PADDING] * padded[-1], [0] * padded[-1]
    for first, start, number, place in zip(real, padded, sizes, places, strict=False):
        token_E[start : start + number] = range(first, first + number)
        position_E[start : start + place] = range(place)
    indices = partitioned_indices(padded, padded[-1], size, rank)
    assert [token_E[index] for index in indices] == rows
    assert [position_E[index] for index in indices] == zigzag.position_BL[0].tolist()


def test_what_is_not_padded_says_so() -> None:
    documents = make([[16, 32]], 0, 2).documents
    assert documents.cu_seqlens_q_padded is documents.cu_seqlens_q
    assert documents.cu_seqlens_q.tolist() == [0, 16, 48]


def test_padding_of_the_last_document_is_before_another() -> None:
    """Padding is never only in the last document, since Transformer Engine up to 2.17 ignores the last offset there."""
    documents = make([[16, 30]], 0, 2).documents
    assert documents.cu_seqlens_q.tolist() == [0, 16, 46, 46]
    assert documents.cu_seqlens_q_padded.tolist() == [0, 16, 48, 52]
    assert (documents.cu_seqlens_q[:-1] != documents.cu_seqlens_q_padded[:-1]).any()


def test_sequences_keep_their_shape() -> None:
    zigzag = make([[48], [48]], 1, 2)
    assert zigzag.position_BL.tolist() == [[*range(12, 36)]] * 2


def test_one_document_that_2p_does_not_divide() -> None:
    zigzag = make([[36]], 0, 4)
    assert zigzag.documents.cu_seqlens_q_padded.tolist() == [0, 40, 48]
    assert zigzag.position_BL.tolist() == [[*range(5), *range(35, 40), 0, 7]]


def test_which_layouts_are_in_zigzag() -> None:
    def in_zigzag(lengths: list[list[int]], shard: ContextShard) -> bool:
        return TokenLayout.from_starts(starts_of(lengths), shard=shard).in_zigzag

    assert in_zigzag([[8], [8]], ContextShard(0, 2, True))
    assert not in_zigzag([[8], [8]], ContextShard(0, 2))
    assert not in_zigzag([[8], [3, 5]], ContextShard(0, 2, True))
    assert not in_zigzag([[8]], ContextShard(0, 1, True))


def test_made_once() -> None:
    layout = TokenLayout.from_starts(starts_of([[3, 5]]), shard=ContextShard(0, 2))
    assert layout.to_zigzag() is layout.to_zigzag()
