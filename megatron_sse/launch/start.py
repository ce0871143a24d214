"""Start the processes of a run on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sse.checkpoint.folders import checkpoint_folder
from megatron_sse.config import RunConfig, count_processes
from megatron_sse.config.world_size import PROCESSES_PER_MACHINE
from megatron_sse.errors import UserError, describe_error
from megatron_sse.launch.agent import run_processes
from megatron_sse.launch.nodes import DEFAULT_PORT, Nodes, find_nodes
from megatron_sse.launch.prepare import prepare_data
from megatron_sse.lease import hold, refuse_if_held_here
from megatron_sse.logs import open_log
from megatron_sse.run_folder import LEASE, launcher_lease
from megatron_sse.visible import count_of

# How long the processes of a command may take to start.
_MINUTES_TO_MEET = 30

THREADS, MEMORY = "OMP_NUM_THREADS", "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def start(config: RunConfig, program: Sequence[str]) -> int:
    """Print torchrun's command for this machine's processes and run them; return the exit status of the first that
    failed, or 0.

    program: python's arguments for each process. Raises UserError where the machine, the data or a checkpoint does not
    fit, before any process starts.
    """
    nodes = find_nodes(os.environ)
    num_gpus = torch.cuda.device_count()
    per_node = count_processes(config, nodes.count, num_gpus)
    folder, key = Path(config.monitor.folder), "monitor.folder"
    if nodes.rank == 0:
        # Rank 0 takes this lease; here it only keeps a second launcher from writing anything.
        refuse_if_held_here(folder, key, LEASE)
    if nodes.count > 1:
        key = f"node {nodes.rank}, monitor.folder"
    is_new = not folder.exists()
    try:
        # Until it is had, nothing is written: neither logs, nor to the place where a live run's launchers meet.
        with hold(folder, key, launcher_lease(nodes.rank)):
            set_environment(per_node, num_gpus)
            if per_node < num_gpus:
                # With rl any number of data-parallel ranks has answers to generate.
                reason = "parallel" if config.rl is not None else "parallel and training.global_batch_size"
                print(f"uses {per_node} of {num_gpus} GPUs, as many as {reason} can feed")
            return _start(config, program, nodes, per_node)
    except UserError:
        # A run that is refused leaves nothing behind; what is not empty stays.
        for made in (checkpoint_folder(config), folder) if is_new else ():
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


def start_command(num_processes: int, layout: str, program: Sequence[str]) -> int:
    """Run a command in several processes, which listen on this machine only; return the exit status of the first that
    failed, or 0.

    layout: the options that ask for the processes. program: python's arguments for each of them. Raises UserError where
    this machine cannot have so many.
    """
    num_gpus = torch.cuda.device_count()
    most = num_gpus or PROCESSES_PER_MACHINE
    if num_processes > most:
        why = "one per GPU" if num_gpus else "on a machine without GPUs"
        raise UserError(f"{layout}: got {count_of(num_processes, 'process')}, allowed {most}, {why}")
    set_environment(num_processes, num_gpus)
    nodes = Nodes(1, 0, "localhost", DEFAULT_PORT)
    return run_processes(program, nodes, num_processes, max_restarts=0, timeout_minutes=_MINUTES_TO_MEET)


def _start(config: RunConfig, program: Sequence[str], nodes: Nodes, per_node: int) -> int:
    try:
        prepare_data(config)
    except OSError as error:
        raise UserError(describe_error(error)) from None
    open_log(config, f"node_{nodes.rank}")
    restarts = config.parallel.max_restarts
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in (THREADS, MEMORY) if name in os.environ]
    command = shlex.join(build_command(program, nodes, per_node, restarts))
    with contextlib.suppress(OSError):
        print(" ".join([*variables, "torchrun", command]), flush=True)
    return run_processes(program, nodes, per_node, restarts, config.parallel.timeout_minutes)


def set_environment(per_node: int, num_gpus: int) -> None:
    """Set what the processes read when they start, unless the user did.

    They share the machine's cores. Without GPUs, large tensors lie in huge pages: torch gets their memory anew for
    every operation, and 512 times fewer pages have to be mapped (quickstart: 1.7 times as fast where mapping is slow).
    """
    if not num_gpus:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault(THREADS, str(max(1, cores // per_node)))
        # The user's own tunables stay, in front of a colon.
        given = os.environ.get(MEMORY, "")
        if HUGE_PAGES not in given:
            os.environ[MEMORY] = f"{given}:{HUGE_PAGES}=1".lstrip(":")
        return
    if per_node > 1:
        # As torchrun has it: GPUs compute, and the cores are left to the processes that read and save.
        os.environ.setdefault(THREADS, "1")


def build_command(program: Sequence[str], nodes: Nodes, per_node: int, max_restarts: int) -> list[str]:
    """Return torchrun's arguments for the same processes; its meeting of this kind exchanges no pickles."""
    place = []
    if nodes.count > 1:
        place = [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}"]
        place += [f"--master-addr={nodes.address}", f"--master-port={nodes.port}"]
    if max_restarts:
        place.append(f"--max-restarts={max_restarts}")
    return [f"--nproc-per-node={per_node}", *place, *program]
