"""Traffic of a mixer over its context group: the formula's bytes at any length, two collectives each way."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron_sse.config import SSEConfig
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.handoff_bytes import handoff_bytes
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.parallel.traffic import Traffic
from tests.model.support import HIDDEN, layout_of, make_mixer
from tests.workers import run_workers

HEADS, KEY_DIM, VALUE_DIM, PARTITIONS = 2, 4, 8, 3
FP64 = 8


def count(recurrence: str, length: int, zigzag: bool) -> tuple[Counter[str], Counter[str], int]:
    """Return calls and bytes of one forward and backward pass, and this rank."""
    groups = init_groups(context=dist.get_world_size())
    settings = SSEConfig(
        recurrence=recurrence,
        num_heads=HEADS,
        head_dim=KEY_DIM,
        value_head_dim=VALUE_DIM,
        num_partitions=PARTITIONS,
    )
    mixer = make_mixer(groups, settings, zigzag=zigzag)
    shard = ContextShard(groups.cp.rank(), groups.cp.size(), zigzag)
    layout = layout_of([[length // 3, length - length // 3]], shard=shard)
    layout.layer_loss_scale = torch.ones(())
    hidden = torch.randn(layout.length, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    with Traffic() as traffic:
        mixer(hidden, None, layout)[0].sum().backward()
    return traffic.calls, traffic.sent, shard.rank


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize("recurrence", ["gla", "gdn"])
@pytest.mark.parametrize(("size", "length"), [(2, 1024), (2, 8192), (8, 1024)])
def test_sent_bytes_are_the_formula(size: int, length: int, recurrence: str, zigzag: bool) -> None:
    units = HEADS * (1 + PARTITIONS)
    for calls, sent, rank in run_workers(size, count, recurrence, length, zigzag):
        chain = ContextShard(rank, size, zigzag).chain
        formula = handoff_bytes(chain, rank, units, KEY_DIM, VALUE_DIM, recurrence == "gdn", element_bytes=FP64)
        assert sent["alltoall_base_"] == sum(formula)
        # The balance loss sums N shares, N probabilities and the number of tokens.
        assert calls == {"alltoall_base_": 4, "allreduce_": 1}
        assert sent["allreduce_"] == 2 * (size - 1) * (2 * PARTITIONS + 1) * FP64 // size
