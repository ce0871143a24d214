"""The hand-off of a run is the one that fits the machines that its launcher names."""

import os
from unittest import mock

import torch.distributed as dist

from megatron_sse.model.build import make_hand_off
from megatron_sse.parallel.groups import init_groups
from tests.model.support import run_config
from tests.workers import run_workers

MODEL = {"num_layers": 1, "hidden_size": 32, "vocab_size": 64, "layers": "sse", "sse": {"num_heads": 2, "head_dim": 8}}


def hand_off_of(machines: int | None) -> tuple[str, list[int], list[int]]:
    config = run_config(MODEL, parallel={"context": 4}, data={"sequence_length": 16})
    groups = init_groups(context=4)
    variables = {} if machines is None else {"GROUP_WORLD_SIZE": str(machines)}
    with mock.patch.dict(os.environ, variables):
        hand_off = make_hand_off(config, groups)
    ranks = [[] if x is None else dist.get_process_group_ranks(x) for x in (hand_off.node_group, hand_off.cross_group)]
    return hand_off.algorithm, *ranks


def test_machines_of_the_launcher() -> None:
    # Three machines have different numbers of processes.
    for machines in (None, 1, 3, 4):
        assert run_workers(4, hand_off_of, machines) == [("exscan", [], [])] * 4
    first, *_, last = run_workers(4, hand_off_of, 2)
    assert first == ("two_level", [0, 1], [0, 2]) and last == ("two_level", [2, 3], [1, 3])
