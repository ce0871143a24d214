"""How many processes a run has, and whether layout and batch divide by them."""

from megatron_sse.config.checks import batch_problems
from megatron_sse.config.problem import show
from megatron_sse.config.run import RunConfig
from megatron_sse.errors import UserError
from megatron_sse.visible import count_of

# Far above what a machine without GPUs can run, each with its own interpreter.
PROCESSES_PER_MACHINE = 256


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Return the size of the data-parallel group when `world_size` processes run.

    Raises UserError where processes, layout and batch do not divide.
    """
    parallel = config.parallel
    layout = f"parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world_size % parallel.replica_size:
        raise UserError(
            f"parallel: got {count_of(world_size, 'process')}, allowed a multiple of {parallel.replica_size} ({layout})"
        )
    data_size = world_size // parallel.replica_size
    if parallel.data is not None and parallel.data != data_size:
        needed = parallel.replica_size * parallel.data
        raise UserError(
            f"parallel.data: got {parallel.data}, allowed {data_size} with {count_of(world_size, 'process')} "
            f"({needed} needed)"
        )
    for key, given, allowed in batch_problems(config, data_size):
        raise UserError(f"{key}: got {show(given)}, allowed {allowed}")
    return data_size


def count_processes(config: RunConfig, num_nodes: int, num_gpus: int) -> int:
    """Return the number of processes on each machine: one per GPU that the batch can feed; without GPUs as many as the
    layout needs.

    Raises UserError where machines, layout and batch do not fit.
    """
    size, data = config.parallel.replica_size, config.parallel.data
    if data is None and num_gpus:
        world_size = max(size, num_nodes * num_gpus)
        # On one machine GPUs may stay idle; across machines all of them count.
        while num_nodes == 1 and world_size > size and not _fits(config, world_size):
            world_size -= 1
    else:
        world_size = size * (data or 1)
    if num_gpus and world_size > num_nodes * num_gpus:
        raise UserError(
            f"parallel: got a layout of {count_of(world_size, 'process')}, allowed {num_nodes * num_gpus}, one per GPU"
        )
    check_world_size(config, world_size)
    if not num_gpus and world_size > num_nodes * PROCESSES_PER_MACHINE:
        raise UserError(
            f"parallel: got a layout of {count_of(world_size, 'process')}, allowed "
            f"{num_nodes * PROCESSES_PER_MACHINE}, {PROCESSES_PER_MACHINE} on each machine without GPUs"
        )
    if world_size % num_nodes:
        raise UserError(
            f"parallel: got a layout of {count_of(world_size, 'process')}, allowed a multiple of {num_nodes} nodes"
        )
    return world_size // num_nodes


def _fits(config: RunConfig, world_size: int) -> bool:
    try:
        check_world_size(config, world_size)
    except UserError:
        return False
    return True
