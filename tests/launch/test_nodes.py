"""The machines of a run, determined from the environment."""

import pytest

from megatron_sse.errors import UserError
from megatron_sse.launch.nodes import Nodes, find_nodes, first_host

SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}


def test_nodes_by_environment() -> None:
    assert find_nodes({}) == Nodes(1, 0, "localhost", 29500)
    explicit = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    assert find_nodes(explicit) == Nodes(2, 1, "first", 1234)
    assert find_nodes(SLURM) == Nodes(2, 1, "gpu07", 29500)
    assert find_nodes(SLURM | explicit) == Nodes(2, 1, "first", 1234)
    assert find_nodes(SLURM | {"MASTER_ADDR": "other"}).address == "other"


WRONG_NODES = [
    ({"NNODES": "two"}, "NNODES: got two, allowed a number from 1 to"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: got nothing, allowed a number from 0 to 1"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK: got 2, allowed a number from 0 to 1"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: not set, allowed the first node's address"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000, allowed a number from 1 to 65535"),
    (SLURM | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID: got a second task on this node"),
    ({"SLURM_NNODES": "1", "SLURM_LOCALID": "1"}, "SLURM_LOCALID: got a second task on this node"),
    ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, "SLURM_JOB_NODELIST: not set"),
]


@pytest.mark.parametrize(("environment", "message"), WRONG_NODES)
def test_wrong_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        find_nodes(environment)


HOSTS = {
    "login1": "login1",
    "a,b": "a",
    "gpu[03-07,12],login1": "gpu03",
    "gpu[9,11]": "gpu9",
    "rack[1-2]n[03-04]": "rack1n03",
    "node-a-[1-3].cluster": "node-a-1.cluster",
    "": "",
}


@pytest.mark.parametrize("node_list", HOSTS)
def test_first_host(node_list: str) -> None:
    assert first_host(node_list) == HOSTS[node_list]


def test_ipv6_addresses() -> None:
    """IPv6 addresses are taken with brackets and without, and shown with them."""
    for given in ("::1", "[::1]"):
        nodes = find_nodes({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": given})
        assert (nodes.address, nodes.place) == ("::1", "[::1]:29500")
