"""Where the machines of a run meet, and meet again after a restart: a store of plain values on the first one."""

import ipaddress
import logging
import secrets
import socket
import time

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from megatron_sse.errors import UserError
from megatron_sse.launch.nodes import Nodes
from megatron_sse.parallel.stores import LOOPBACK, host_store

logger = logging.getLogger(__name__)

# The other machines kill their processes 30 seconds after they told them to stop.
SECONDS_TO_LEAVE = 40.0
SECONDS_BETWEEN_LOOKS = 0.1
# Keys of the store: of the whole run, and of a round (all machines meet once per round).
_ROUND, _HERE, _ENDED, _LEFT = "round", "here", "ended", "left"
_JOINED, _CALL, _START = "joined", "call", "start"


class Meeting(RendezvousHandler):
    """A rendezvous of the machines, each with its number. Each time all have met, their processes get a new store.

    A launcher enters a token of its own under its machine's number. When all numbers are taken, the first machine calls
    them; it starts the round when all have answered, so that nobody waits for a launcher that has died since.
    The first machine keeps the stores: they outlive any process, and no other machine's name has to be known.
    """

    def __init__(self, nodes: Nodes, store: Store, interface: str, timeout_minutes: float) -> None:
        """interface: the address at which the stores of the first machine listen."""
        self.nodes, self.store, self.interface = nodes, store, interface
        self.seconds_to_meet = 60 * timeout_minutes + SECONDS_TO_LEAVE
        self.token = secrets.token_hex(8)
        # The last round in which all machines met.
        self.round = -1
        self.processes_store: TCPStore | None = None
        store.add(_HERE, 1)

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return "megatron_sse"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all machines are here. Raises RendezvousError; UserError where two have the same number."""
        end = time.monotonic() + self.seconds_to_meet
        try:
            while (port := self._join(end)) is None:
                pass
        except DistError as error:
            raise RendezvousConnectionError(str(error)) from error
        address = LOOPBACK if self.nodes.count == 1 else self.nodes.address
        place = RendezvousStoreInfo(address, port)
        return RendezvousInfo(self._of_round(self.round), self.nodes.rank, self.nodes.count, place)

    def _of_round(self, number: int) -> PrefixStore:
        return PrefixStore(f"{_ROUND}/{number}", self.store)

    def _join(self, end: float) -> int | None:
        """Return the port of the processes' store; None where the round started without this launcher."""
        number = self.store.add(_ROUND, 0)
        here = self._of_round(number)
        place = str(self.nodes.rank)
        here.set(place, self.token)
        here.set(_JOINED, "")
        while True:
            if self.is_closed():
                raise RendezvousClosedError
            if time.monotonic() > end:
                raise RendezvousTimeoutError
            # The first machine is waited for, so that the error below lists it.
            if here.check(["0"]):
                if here.get(place).decode() != self.token:
                    self._refuse(here)
                if here.check([_CALL]):
                    here.set(f"{_CALL}/{place}", self.token)
                if self.nodes.rank == 0:
                    self._lead(number, here)
            if here.check([_START]):
                port, *tokens = here.get(_START).decode().split()
                if tokens[self.nodes.rank] == self.token:
                    self.round = number
                    return int(port)
                if self.store.add(_ROUND, 0) > number:
                    return None
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _lead(self, number: int, here: PrefixStore) -> None:
        """Call all machines when all are here, and start the round when all have answered."""
        places = list(map(str, range(self.nodes.count)))
        answers = [f"{_CALL}/{place}" for place in places]
        if not here.check(places):
            return
        if not here.check([_CALL]):
            here.set(_CALL, "")
        elif here.check(answers) and (tokens := here.multi_get(places)) == here.multi_get(answers):
            self.processes_store = host_store(self.interface)
            here.set(_START, f"{self.processes_store.port} {' '.join(token.decode() for token in tokens)}")
            self.store.add(_ROUND, 1)

    def _refuse(self, here: PrefixStore) -> None:
        numbers = [number for number in range(self.nodes.count) if here.check([str(number)])]
        got, count = ", ".join(map(str, sorted([*numbers, self.nodes.rank]))), self.nodes.count
        raise UserError(f"NODE_RANK: got {got} on {count} nodes, allowed each number from 0 to {count - 1} once")

    def num_nodes_waiting(self) -> int:
        """Return 0. torch's agent would restart its processes at any other number without a cause and uncounted."""
        return 0

    def is_waited_for(self) -> bool:
        """Return whether a launcher waits for the next round: it was started again, or its processes failed."""
        return self._of_round(self.round + 1).check([_JOINED])

    def is_closed(self) -> bool:
        return self.store.check([_ENDED])

    def set_closed(self) -> None:
        self.store.compare_set(_ENDED, "", "1 another machine ended the run")

    def shutdown(self) -> bool:
        return True

    def end(self, status: int, reason: str) -> None:
        """Tell the other machines that the run has ended, with an exit status and its cause; the first one to do so
        counts. The machine where all meet waits for them to read it, at most SECONDS_TO_LEAVE seconds."""
        try:
            self.store.compare_set(_ENDED, "", f"{status} {reason}")
            number = self.store.add(_LEFT, 1)
            end = time.monotonic() + SECONDS_TO_LEAVE
            while self.nodes.rank == 0 and number < self._number_here() and time.monotonic() < end:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                number = self.store.add(_LEFT, 0)
        except DistError:
            # The first machine has ended, so that there is nobody to tell.
            pass

    def _number_here(self) -> int:
        # Before the first round there can be more launchers than numbers: two with the same one.
        return self.nodes.count if self.round >= 0 else self.store.add(_HERE, 0)

    def why_ended(self) -> tuple[int, str]:
        """Return exit status and cause of a run that another machine has ended."""
        status, _, reason = self.store.get(_ENDED).decode().partition(" ")
        return int(status), reason


def meet(nodes: Nodes, timeout_minutes: float) -> Meeting:
    """Make the store where the machines meet, or connect to it. next_rendezvous then waits for them.

    A single machine needs no store that others reach. Raises UserError where the first machine cannot listen,
    RendezvousTimeoutError where it does not answer, RendezvousConnectionError where the connection is lost at once.
    """
    if nodes.count == 1:
        return Meeting(nodes, HashStore(), LOOPBACK, timeout_minutes)
    logger.info("node %d of %d, waiting for the others at %s", nodes.rank, nodes.count, nodes.place)
    if nodes.rank == 0:
        interface, store = _host(nodes)
        return Meeting(nodes, store, interface, timeout_minutes)
    _wait_for_first(nodes, timeout_minutes)
    try:
        return Meeting(nodes, TCPStore(nodes.address, nodes.port, is_master=False), "", timeout_minutes)
    except DistError as error:
        raise RendezvousConnectionError(str(error)) from error


def _host(nodes: Nodes) -> tuple[str, TCPStore]:
    """Listen where the other machines reach this one, on no other interface; return that address and the store."""
    try:
        interface = _find_interface(nodes)
        return interface, host_store(interface, nodes.port)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: got {nodes.place}, allowed a free port and an address under "
            f"which this node, the first one, can be reached ({error.strerror or error})"
        ) from None


def _find_interface(nodes: Nodes) -> str:
    """Return the address of this machine at which a connection to MASTER_ADDR arrives; "" stands for all of them.

    The two differ where addresses are translated, as for containers.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", nodes.port), family=family, dualstack_ipv6=both) as server:
        server.settimeout(10)
        with socket.create_connection((nodes.address, nodes.port), timeout=10):
            arrived = server.accept()[0]
            with arrived:
                found = str(arrived.getsockname()[0]).removeprefix("::ffff:")
    if ipaddress.ip_address(found).is_loopback and not _means_loopback(nodes.address):
        # Many systems have their own name in /etc/hosts as 127.0.1.1, while it is another address to the others.
        logger.warning(
            "MASTER_ADDR: %s is %s on this node, so its ports are open on all interfaces; give an address of the "
            "network between the nodes to open them there only",
            nodes.address,
            found,
        )
        return ""
    return found


def _means_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.startswith("localhost")


def _wait_for_first(nodes: Nodes, timeout_minutes: float) -> None:
    """Wait until the first machine answers. Unlike torch's own wait, signals interrupt it, and it is logged."""
    end, is_told = time.monotonic() + 60 * timeout_minutes, False
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise RendezvousTimeoutError(f"parallel.timeout_minutes: no answer from {nodes.place} ({reason})")
        if not is_told:
            logger.info("no answer from %s yet (%s)", nodes.place, reason)
            is_told = True
        time.sleep(1)
