"""Process groups: of torch.distributed, and on top of it those of tensor, pipeline, context and data parallelism."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_sse.parallel.device import Device
from megatron_sse.parallel.stores import stay_on_this_machine

# Names of a context group's parts, in Megatron-Core's style; error messages print them.
NODE_GROUP, CROSS_GROUP = "CONTEXT_PARALLEL_NODE_GROUP", "CONTEXT_PARALLEL_CROSS_GROUP"


def this_rank() -> int:
    """Return this process's rank, also where there is no process group (yet)."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def processes_per_node() -> int:
    """Return the number of processes on each machine, by the number of machines that the launcher names; else all.

    It is the same on every rank, unlike LOCAL_WORLD_SIZE. Where the processes do not divide among the machines it is 1.
    """
    size, nodes = dist.get_world_size(), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return 1 if size % nodes else size // nodes


def init_process_group(device: Device, timeout_minutes: float = 30) -> None:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

    Without these variables, this process makes a group of its own.
    """
    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
    if device.type == "cuda":
        # NCCL connects now, on this GPU, instead of guessing one at the first collective.
        options["device_id"] = torch.device("cuda", torch.cuda.current_device())
    if "RANK" not in os.environ:
        stay_on_this_machine()
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(device.backend, **options)


def init_groups(
    tensor: int = 1, pipeline: int = 1, virtual_pipeline: int = 1, context: int = 1, timeout_minutes: float = 30
) -> ProcessGroupCollection:
    """Split all processes into groups of tensor, pipeline, context and data parallelism.

    Neighbouring ranks share a tensor group; data parallelism gets the factor that is left over: with tensor 2 and
    pipeline 2, 8 processes have data parallelism 2.

    virtual_pipeline: model chunks per pipeline rank. The number of processes has to be a multiple of
    tensor * pipeline * context (the configuration checks it), and torch.distributed has to be initialised.
    """
    assert dist.get_world_size() % (tensor * pipeline * context) == 0
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def groups_of_one(device: Device) -> ProcessGroupCollection:
    """Return the groups of this process alone; the first call makes them."""
    if not dist.is_initialized():
        init_process_group(device)
        return init_groups()
    assert dist.get_world_size() == 1
    return ProcessGroupCollection.use_mpu_process_groups()


def split_by_node(
    group: ProcessGroup, ranks_per_node: int, timeout_minutes: float = 30
) -> tuple[ProcessGroup, ProcessGroup]:
    """Return two groups: this rank's node, and the ranks that have its place on the other nodes.

    A node is a run of `ranks_per_node` neighbours in the group: ranks 0 to 5 with 2 per node make the nodes (0, 1),
    (2, 3), (4, 5) and the peers (0, 2, 4), (1, 3, 5). Collective over all processes: each has to call it with its own
    group.
    """
    # torch.distributed wants every process to create every group, also those it is not in, in the same order.
    every_group: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every_group, dist.get_process_group_ranks(group))
    mine: list[ProcessGroup] = []
    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
    for find, name in ((_nodes, NODE_GROUP), (_peers, CROSS_GROUP)):
        parts = {part for ranks in every_group for part in find(tuple(ranks), ranks_per_node)}
        for part in sorted(parts):
            made = dist.new_group(list(part), group_desc=name, **options)
            if dist.get_rank() in part:
                mine.append(made)
    node, peers = mine
    return node, peers


def _nodes(ranks: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def _peers(ranks: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [ranks[place::size] for place in range(size)]


def destroy_groups() -> None:
    """Undo init_groups, so that the same processes can set up another layout."""
    # Megatron-Core only drops its references; each group keeps its threads and connections until it is destroyed.
    made = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in made:
        dist.destroy_process_group(group)
