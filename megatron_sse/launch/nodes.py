"""The machines of a run: how they are found, and how they meet at the first one."""

import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from megatron_sse.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 29500
# The other machines kill their processes 30 seconds after they told them to stop.
SECONDS_TO_LEAVE = 40.0
RUN_ID = "megatron_sse"
_ENDED = "ended"


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, which one this is, and where the first one listens."""

    count: int
    rank: int
    address: str
    port: int


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """Return the machines by NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT; under srun by Slurm's; else this one.

    Raises UserError for a variable that is missing, or is not a number in its range.
    """
    slurm = "NNODES" not in environment and "SLURM_NNODES" in environment
    count = _number(environment, "SLURM_NNODES" if slurm else "NNODES", 1, 1 << 20, default=1)
    port = _number(environment, "MASTER_PORT", 1, 65535, default=DEFAULT_PORT)
    if count == 1:
        return Nodes(1, 0, "localhost", port)
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
    """Return the first host of Slurm's notation: gpu03 of gpu[03-07,12],login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^,\]-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _number(environment: Mapping[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}: got {text or 'nothing'}, allowed a number from {low} to {high}")
    return int(text)


class Meeting(DynamicRendezvousHandler):
    """torch's rendezvous, with ranks by node number. Each time all machines have met, their processes get a new store.

    The first machine keeps the stores, so that they outlive any process and no other machine's name has to be known.
    """

    nodes: Nodes
    # The store of the machines, and that of the processes since they last met.
    store: Store
    processes_store: TCPStore
    has_met = False

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all machines are here. Raises RendezvousError; UserError where two have the same number."""
        met = super().next_rendezvous()
        self.has_met = True
        try:
            met.store.set(f"node/{met.rank}", str(self.nodes.rank))
            keys = [f"node/{rank}" for rank in range(met.world_size)]
            numbers = sorted(map(int, met.store.multi_get(keys)))
            if numbers != list(range(self.nodes.count)):
                raise UserError(
                    f"NODE_RANK: got {', '.join(map(str, numbers))} on {self.nodes.count} nodes, allowed each "
                    f"number from 0 to {self.nodes.count - 1} once"
                )
            if self.nodes.rank == 0:
                self.processes_store = TCPStore(self.nodes.address, 0, is_master=True, wait_for_workers=False)
                met.store.set("port", str(self.processes_store.port))
            port = int(met.store.get("port"))
        except DistError as error:
            raise RendezvousConnectionError(str(error)) from error
        return RendezvousInfo(met.store, self.nodes.rank, met.world_size, RendezvousStoreInfo(self.nodes.address, port))

    def end(self, status: int, reason: str) -> None:
        """Tell the other machines that the run has ended, with an exit status and its cause; the first one to do so
        counts. The machine where all meet waits for them to read it, at most SECONDS_TO_LEAVE seconds."""
        try:
            self.store.compare_set(_ENDED, "", f"{status} {reason}")
            self.set_closed()
            number = self.store.add("left", 1)
            here = self.nodes.count if self.has_met else len(self._state_holder.state.participants)
            end = time.monotonic() + SECONDS_TO_LEAVE
            while self.nodes.rank == 0 and number < here and time.monotonic() < end:
                time.sleep(0.1)
                number = self.store.add("left", 0)
        except (DistError, RendezvousConnectionError):
            # The first machine has ended, so that there is nobody to tell.
            pass

    def why_ended(self) -> tuple[int, str]:
        """Return exit status and cause of a run that another machine has ended."""
        if not self.store.check([_ENDED]):
            return 1, "another machine ended the run"
        status, _, reason = self.store.get(_ENDED).decode().partition(" ")
        return int(status), reason


def meet(nodes: Nodes, timeout_minutes: float) -> Meeting:
    """Make the store where the machines meet, or connect to it. next_rendezvous then waits for them.

    Raises UserError where the first machine cannot listen, RendezvousTimeoutError where it does not answer,
    RendezvousConnectionError where the connection is lost at once.
    """
    # torch would make a store for the processes under a host name that other machines may not know.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    count, endpoint = nodes.count, f"{nodes.address}:{nodes.port}"
    if count > 1:
        logger.info("node %d of %d, waiting for the others at %s", nodes.rank, count, endpoint)
    if nodes.rank:
        _wait_for_first(nodes, timeout_minutes)
    elif count > 1:
        _check_place(nodes)
    else:
        # A single machine takes any free port.
        endpoint = f"{nodes.address}:0"
    parameters = RendezvousParameters("c10d", endpoint, RUN_ID, count, count, is_host=nodes.rank == 0)
    backend, store = create_backend(parameters)
    # Sorted by this name, the machines are in the order of their numbers.
    name = f"{nodes.rank:07d} {socket.gethostname()}"
    timeout = RendezvousTimeout(join=timedelta(minutes=timeout_minutes, seconds=SECONDS_TO_LEAVE))
    meeting: Meeting = Meeting.from_backend(RUN_ID, store, backend, count, count, name, timeout)
    meeting.nodes, meeting.store = nodes, store
    return meeting


def _check_place(nodes: Nodes) -> None:
    try:
        with socket.create_server(("", nodes.port)):
            socket.create_connection((nodes.address, nodes.port), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: got {nodes.address}:{nodes.port}, allowed a free port and an address under "
            f"which this node, the first one, can be reached ({error.strerror or error})"
        ) from None


def _wait_for_first(nodes: Nodes, timeout_minutes: float) -> None:
    """Wait until the first machine answers. Unlike torch's own wait, signals interrupt it, and it is logged."""
    end, is_told = time.monotonic() + 60 * timeout_minutes, False
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        place = f"{nodes.address}:{nodes.port}"
        if time.monotonic() > end:
            raise RendezvousTimeoutError(f"parallel.timeout_minutes: no answer from {place} ({reason})")
        if not is_told:
            logger.info("no answer from %s yet (%s)", place, reason)
            is_told = True
        time.sleep(1)
