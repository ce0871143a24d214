"""The machines of a run: how many, which one this is, and where the first one listens."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sse.errors import UserError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, which one this is, and where the first one listens."""

    count: int
    rank: int
    # A name, or an address without the brackets that [::1]:29500 has.
    address: str
    port: int

    @property
    def place(self) -> str:
        """Address and port of the first machine in one word."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """Return the machines by NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT; under srun by Slurm's; else this one.

    Raises UserError for a variable that is missing, or is not a number in its range.
    """
    slurm = "NNODES" not in environment and "SLURM_NNODES" in environment
    count = _number(environment, "SLURM_NNODES" if slurm else "NNODES", 1, 1 << 20, default=1)
    port = _number(environment, "MASTER_PORT", 1, 65535, default=DEFAULT_PORT)
    if slurm and environment.get("SLURM_LOCALID", "0") != "0":
        raise UserError("SLURM_LOCALID: got a second task on this node, allowed one: srun --ntasks-per-node=1")
    if count == 1:
        return Nodes(1, 0, "localhost", port)
    rank = _number(environment, "SLURM_NODEID" if slurm else "NODE_RANK", 0, count - 1)
    address = environment.get("MASTER_ADDR", "")
    if slurm:
        address = address or first_host(environment.get("SLURM_JOB_NODELIST", ""))
    if not address:
        missing = "SLURM_JOB_NODELIST" if slurm else "MASTER_ADDR"
        raise UserError(f"{missing}: not set, allowed the first node's address, since there are {count} nodes")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
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
