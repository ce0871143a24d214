"""Bytes that a real training step sends, by group."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sse.data.iterators import build_data_iterators
from megatron_sse.parallel.groups import CROSS_GROUP, NODE_GROUP
from megatron_sse.parallel.traffic import Traffic
from tests.training.support import small_run, start

# Axis of each group, by Megatron-Core's names of its groups.
AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tensor",  # halos between parts of the sequence
    "EMBEDDING_GROUP": "pipeline",
    "CONTEXT_PARALLEL_GROUP": "context",
    NODE_GROUP: "context",
    CROSS_GROUP: "context",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
}
# Groups over which the gradient norm, one number, is summed.
NORM_GROUPS = ("MODEL_PARALLEL_GROUP", "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP", "default_pg")
NORM_BYTES = 4


class TrafficByGroup(Traffic):
    """A traffic counter that adds up bytes by (group's name, collective)."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::broadcast_":  # sends the number of tokens in the batch, which Traffic does not count
            return func(*args, **(kwargs or {}))
        before = self.sent.total()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.sent.total() > before:
            boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
            group = dist.ProcessGroup.unbox(boxed)
            self.by_group[group.group_desc, func.name().removeprefix("c10d::")] += self.sent.total() - before
        return result


def count_step(folder: Path, sections: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """Return the bytes by axis that this rank sends in a step, its pipeline stage and its context rank."""
    run = start(small_run(folder, **sections))
    batches, _ = build_data_iterators(run.stage, run.groups, 0)
    with TrafficByGroup() as traffic:
        run.trainer.train_step(batches)
    by_axis = dict.fromkeys(AXES.values(), 0)
    for (group, collective), sent in traffic.by_group.items():
        # When two stages send in both directions at once, one of them uses the group of all processes.
        axis = "pipeline" if collective == "send" and "CONTEXT" not in group else AXES.get(group)
        if axis is None:
            assert group in NORM_GROUPS and sent <= 2 * NORM_BYTES, (group, collective, sent)
        else:
            by_axis[axis] += sent
    return by_axis, run.groups.pp.rank(), run.groups.cp.rank()
