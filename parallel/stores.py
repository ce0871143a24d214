"""Stores that processes find each other by: they listen at one address, and hold plain values, never pickles."""

import os
import socket

import psutil
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"


def host_store(address: str, port: int = 0) -> TCPStore:
    """Return a store that listens at one address of this machine; port 0 takes any free one (`store.port`).

    torch itself would listen at all addresses, as this does for an empty one. Raises OSError where the address or the
    port cannot be had.
    """
    both = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
    # As long a queue as the system allows: all processes of a run connect at once.
    server = socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=both)
    port = server.getsockname()[1]
    return TCPStore(address or LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


def stay_on_this_machine() -> None:
    """Let gloo and NCCL of this process and its children listen on the loopback interface only, unless told otherwise.

    Only for runs whose processes are all on this machine.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
