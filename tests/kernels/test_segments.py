"""The chunk grid and the sort by segment, against loops."""

import pytest
import torch

from megatron_sse.kernels import segments
from megatron_sse.kernels.routing import sort_by_segment
from megatron_sse.kernels.segments import Segments, from_chunks, make_grid, to_chunks


@pytest.fixture(params=["used", "all"])
def with_unused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the grid has chunks that are not used, as on a GPU."""
    if request.param == "all":
        keep_unused_chunks(monkeypatch)
    return request.param == "all"


def keep_unused_chunks(patch: pytest.MonkeyPatch) -> None:
    cut = segments.cut
    patch.setattr(segments, "cut", lambda *args, only_used=False: cut(*args))


SIZES = [(5,), (1, 1, 1), (0, 4, 0, 0, 9, 8, 0), (3, 0, 16, 1, 0), (0, 0, 7)]


@pytest.mark.parametrize("chunk_size", [1, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grid(sizes: tuple[int, ...], chunk_size: int, with_unused: bool) -> None:
    num_heads, num_rows = 2, sum(sizes)
    offsets = torch.nn.functional.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    grid = make_grid(Segments(offsets, order), num_rows, num_heads, chunk_size)

    expected, used, start = [], 0, 0
    for segment, size in enumerate(sizes):
        rows = order[start : start + size].tolist()
        chunks = [rows[i : i + chunk_size] for i in range(0, size, chunk_size)]
        for i in range(len(chunks)):
            assert (grid.chunks.segment_M[used + i], grid.chunks.step_M[used + i]) == (segment, i)
        expected += [chunk + [None] * (chunk_size - len(chunk)) for chunk in chunks]
        start, used = start + size, used + len(chunks)
        assert grid.chunks.empty_S[segment] == (size == 0)
        if size:
            assert (grid.chunks.first_S[segment], grid.chunks.last_S[segment]) == (used - len(chunks), used - 1)
    num_chunks = num_rows // chunk_size + len(sizes) if with_unused else used
    assert used <= num_chunks
    expected += [[None] * chunk_size] * (num_chunks - used)

    padding = num_rows * num_heads
    for chunk, rows in zip(grid.row.view(num_chunks, num_heads, chunk_size).tolist(), expected, strict=True):
        for head in range(num_heads):
            assert chunk[head] == [padding if row is None else row * num_heads + head for row in rows]
    assert torch.equal(grid.row[grid.place], torch.arange(padding))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("with_unused")
def test_rows_go_to_chunks_and_back(sizes: tuple[int, ...]) -> None:
    num_rows = sum(sizes)
    offsets = torch.nn.functional.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    grid = make_grid(Segments(offsets, order), num_rows, 2, 4)
    x = torch.randn(num_rows, 2, 3, dtype=torch.float64, requires_grad=True)
    chunks = to_chunks(x, grid)
    assert torch.equal(from_chunks(chunks, grid), x)
    assert chunks.count_nonzero() == x.numel()  # padding is zero
    torch.autograd.gradcheck(lambda x: to_chunks(x, grid), (x,))
    torch.autograd.gradcheck(lambda x: from_chunks(x, grid), (chunks.detach().requires_grad_(),))


def test_sort_by_segment() -> None:
    num_documents, num_partitions = 3, 4
    document = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    bank = torch.tensor([[2, 0], [0, 2], [3, 1], [1, 0], [0, 3], [1, 0], [2, 3]])
    order, offsets = sort_by_segment(bank, document, num_documents, num_partitions)
    position = 0
    for d in range(num_documents):
        for n in range(num_partitions):
            picks = [t * 2 + p for t in range(7) for p in range(2) if document[t] == d and bank[t, p] == n]
            segment = d * num_partitions + n
            assert offsets[segment : segment + 2].tolist() == [position, position + len(picks)]
            assert order[position : position + len(picks)].tolist() == picks
            position += len(picks)
