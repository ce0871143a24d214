"""Every packing mode against a loop over documents, and its report of padding and cut documents."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_sse.config import DataConfig
from megatron_sse.data.packing import best_fit, pack, split_long

ROOM = 17


def settings(packing: str, long_documents: str) -> DataConfig:
    return DataConfig(train="x", sequence_length=ROOM - 1, packing=packing, long_documents=long_documents)


def file_offsets(seed: int, longest: int = 60, first: int = 100, documents: int = 80) -> np.ndarray:
    """Return the offsets of random documents of 0 to `longest` tokens, which start `first` tokens into the file."""
    sizes = np.random.default_rng(seed).integers(0, longest + 1, documents)
    return first + np.concatenate([[0], np.cumsum(sizes)])


def labels_of(packing, offsets_D1):
    """Count how often each token of the file is a label of the token before it in the same document."""
    counts = np.zeros(offsets_D1[-1] + 1, dtype=int)
    for sample in range(packing.account.samples):
        for begin, count in packing.pieces(sample):
            counts[begin + 1 : begin + count] += 1
    return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
@pytest.mark.parametrize("long_documents", ["continue", "cut"])
def test_pieces_lie_in_one_document_and_fit(packing, long_documents, seed):
    offsets_D1 = file_offsets(seed)
    packed = pack(settings(packing, long_documents), offsets_D1)
    for sample in range(packed.account.samples):
        pieces = packed.pieces(sample)
        total = sum(count for _, count in pieces)
        assert total <= ROOM
        assert total == ROOM or packing == "best_fit" or long_documents == "cut"
        for begin, count in pieces:
            document = np.searchsorted(offsets_D1, begin, side="right") - 1
            assert count == 0 or offsets_D1[document] <= begin and begin + count <= offsets_D1[document + 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
def test_every_token_is_a_label_once_when_documents_continue(packing, seed):
    offsets_D1 = file_offsets(seed)
    counts = labels_of(pack(settings(packing, "continue"), offsets_D1), offsets_D1)
    wanted = np.ones_like(counts)
    wanted[: offsets_D1[0]] = 0
    wanted[offsets_D1] = 0
    # in_order leaves out the tail that does not fill a sample.
    last = len(wanted) if packing == "best_fit" else offsets_D1[-1] - ROOM
    np.testing.assert_array_equal(counts[:last], wanted[:last])
    assert counts.max() == 1


def test_cut_documents_keep_their_beginning():
    offsets_D1 = np.array([0, 40, 50, 53])
    samples = pack(settings("in_order", "cut"), offsets_D1)
    assert [samples.pieces(number) for number in range(2)] == [[(0, 17)], [(40, 10), (50, 3)]]
    assert samples.account.samples == 2 and samples.account.dropped == 23 and samples.account.split == 1
    fitted = pack(settings("best_fit", "cut"), offsets_D1)
    assert [fitted.pieces(number) for number in range(2)] == [[(0, 17)], [(40, 10), (50, 3)]]
    assert fitted.account.padding == 4


def test_windows_say_what_they_split():
    # Samples end at tokens 16, 32 and 48: inside the first document, at the third one's start, at its last token.
    packed = pack(settings("in_order", "continue"), np.array([0, 20, 32, 49]))
    assert packed.account.samples == 3 and packed.account.split == 1 and packed.account.dropped == 0
    assert packed.pieces(1) == [(16, 4), (20, 12), (32, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_textbook_algorithm(seed):
    """Among samples with the same room the one that came last is filled: kept tables and checkpoints rely on it."""
    offsets_D1 = file_offsets(seed, longest=40, documents=60)
    # Documents without a token, and several of one length.
    offsets_D1 = np.concatenate((offsets_D1, offsets_D1[-1] + np.cumsum([0, *[1 + seed] * 40, 0])))
    table = split_long(offsets_D1, ROOM, keep_rest=True)
    free: list[tuple[int, int]] = []
    sample_p, samples = np.zeros(len(table.length_p), dtype=np.int64), 0
    for piece in sorted(range(len(sample_p)), key=lambda piece: (-table.length_p[piece], piece)):
        length = int(table.length_p[piece])
        chosen = min((room for room, _ in free if room >= length), default=None)
        if chosen is None:
            chosen, sample_p[piece], samples = ROOM, samples, samples + 1
        else:
            at = max(number for number, (room, _) in enumerate(free) if room == chosen)
            sample_p[piece] = free.pop(at)[1]
        if chosen > length:
            free.append((chosen - length, int(sample_p[piece])))
    assert samples > 20 and np.array_equal(best_fit(table, ROOM).sample_p, sample_p)


def test_best_fit_wastes_less_than_next_fit():
    offsets_D1 = file_offsets(0, longest=ROOM, documents=2000)
    fitted = pack(settings("best_fit", "continue"), offsets_D1)
    next_fit, free = 1, ROOM
    for first, last in pairwise(offsets_D1.tolist()):
        if last - first > free:
            next_fit, free = next_fit + 1, ROOM
        free -= last - first
    assert fitted.account.samples < 0.8 * next_fit
    assert fitted.account.split == 0 and fitted.account.dropped == 0


@pytest.mark.parametrize("documents", [[], [0], [1], [0, 0, 1]])
@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
@pytest.mark.parametrize("long_documents", ["continue", "cut"])
def test_hardly_any_tokens(packing, long_documents, documents):
    offsets_D1 = np.concatenate([[0], np.cumsum(documents)]).astype(np.int64)
    packed = pack(settings(packing, long_documents), offsets_D1)
    held = [packed.pieces(number) for number in range(packed.account.samples)]
    assert sum(count for pieces in held for _, count in pieces) <= sum(documents)
    assert "samples" in str(packed.account)
