"""The likeliest token of logits split over ranks equals that of the complete logits."""

import pytest
import torch

from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.vocabulary import likeliest_tokens
from tests.workers import run_workers

ROWS, PADDED = 50, 24


def find_likeliest(logits_wv: torch.Tensor, vocab_size: int) -> list[int]:
    group = init_groups(tensor=torch.distributed.get_world_size()).tp
    part_wv = logits_wv.chunk(group.size(), dim=1)[group.rank()]
    return likeliest_tokens(part_wv, vocab_size, group).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [PADDED, 13, 5])
def test_like_one_rank(world_size: int, vocab_size: int) -> None:
    """Split logits give the same token, also with ranks of padding only, with ties, and with all logits negative."""
    logits_wv = torch.randint(-9, -1, (ROWS, PADDED), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_wv[:, vocab_size:] = 7.0
    expected = [row.index(max(row)) for row in logits_wv[:, :vocab_size].tolist()]
    assert len(set(expected)) > 3
    assert run_workers(world_size, find_likeliest, logits_wv, vocab_size) == [expected] * world_size


def test_no_rows() -> None:
    assert run_workers(2, find_likeliest, torch.empty(0, PADDED), PADDED) == [[], []]
