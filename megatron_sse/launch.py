"""Starts the processes of a run on this machine: `python -m megatron_sse.launch CONFIG [section.key=value ...]`."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_sse.cli import INTERRUPT_EXIT, USER_ERROR_EXIT, prepare_data, set_up_logging
from megatron_sse.config import RunConfig, check_world_size, load_config
from megatron_sse.errors import UserError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, which one this is, and where the first one listens."""

    count: int
    rank: int
    address: str
    port: int


def main(arguments: list[str]) -> int:
    """Check the settings, print torchrun's command and run it. Exit status as the command line's."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: run.sh CONFIG [section.key=value ...]", file=sys.stderr)
        return USER_ERROR_EXIT
    set_up_logging(rank=0)
    try:
        config = load_config(arguments[0], arguments[1:])
        nodes = find_nodes(os.environ)
        num_gpus = torch.cuda.device_count()
        per_node = count_processes(config, nodes.count, num_gpus)
        prepare_data(config)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        return INTERRUPT_EXIT
    if not num_gpus:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // per_node)))
    elif per_node < num_gpus:
        print(f"uses {per_node} of {num_gpus} GPUs, as many as parallel and training.global_batch_size can feed")
    command = build_command(arguments, nodes, per_node)
    threads = os.environ.get("OMP_NUM_THREADS")
    print(f"{f'OMP_NUM_THREADS={threads} ' if threads else ''}torchrun {shlex.join(command)}", flush=True)
    return run_torchrun(command)


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """The machines by NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT; under srun by Slurm's variables; else this one.

    Raises UserError for a variable that is missing or no number in its range.
    """
    slurm = "NNODES" not in environment and "SLURM_NNODES" in environment
    count = _number(environment, "SLURM_NNODES" if slurm else "NNODES", 1, 1 << 20, default=1)
    port = _number(environment, "MASTER_PORT", 1, 65535, default=DEFAULT_PORT)
    if count == 1:
        return Nodes(1, 0, environment.get("MASTER_ADDR", "localhost"), port)
    rank = _number(environment, "SLURM_NODEID" if slurm else "NODE_RANK", 0, count - 1)
    address = environment.get("MASTER_ADDR", "")
    if slurm:
        if environment.get("SLURM_LOCALID", "0") != "0":
            raise UserError("SLURM_LOCALID: got a second task on this node, allowed one: srun --ntasks-per-node=1")
        address = address or first_host(environment.get("SLURM_JOB_NODELIST", ""))
    if not address:
        missing = "SLURM_JOB_NODELIST" if slurm else "MASTER_ADDR"
        raise UserError(f"{missing}: not set, allowed the first node's address, since there are {count} nodes")
    return Nodes(count, rank, address, port)


def first_host(node_list: str) -> str:
    """First host of Slurm's notation: gpu[03-07,12],login1 is gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^,\]-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _number(environment: Mapping[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}: got {text or 'nothing'}, allowed a number from {low} to {high}")
    return int(text)


def count_processes(config: RunConfig, num_nodes: int, num_gpus: int) -> int:
    """Processes on each machine: one per GPU that the batch can feed; without GPUs as many as the layout needs.

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
            f"parallel: got a layout of {world_size} processes, allowed {num_nodes * num_gpus}, one per GPU"
        )
    check_world_size(config, world_size)
    if world_size % num_nodes:
        raise UserError(f"parallel: got a layout of {world_size} processes, allowed a multiple of {num_nodes} nodes")
    return world_size // num_nodes


def _fits(config: RunConfig, world_size: int) -> bool:
    try:
        check_world_size(config, world_size)
    except UserError:
        return False
    return True


def build_command(arguments: list[str], nodes: Nodes, per_node: int) -> list[str]:
    """torchrun's arguments."""
    if nodes.count == 1:
        place = ["--standalone"]
    else:
        place = [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}"]
        place += [f"--master-addr={nodes.address}", f"--master-port={nodes.port}"]
    return [f"--nproc-per-node={per_node}", *place, "-m", "megatron_sse", "train", *arguments]


def run_torchrun(command: list[str]) -> int:
    """Run torchrun with these arguments; the exit status of the first process that failed, 128 + a signal's number."""
    # A terminated run saves and ends by itself: torchrun would kill it after 30 seconds.
    signal.signal(signal.SIGTERM, _pass_on)
    options = torchrun.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *command])
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A user's error has been printed by its rank; of a killed process nothing has.
        if failure.exitcode < 0:
            print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except KeyboardInterrupt:
        return INTERRUPT_EXIT
    return 0


def _pass_on(signum: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
