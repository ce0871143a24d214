"""How states are handed off: between which ranks, in which order, by which algorithm."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sse.parallel.sharding import Chain

ALGORITHMS = ("exscan", "allgather", "p2p", "two_level")


@dataclass(frozen=True)
class HandOff:
    """What begin_exclusive_scan needs besides the tensors; known on the host and the same on every rank.

    Attributes:
        chain: (rank in the group, slot) of the slots of all ranks, in the order of the sequence.
        group: the context ranks; may be None when there is one.
        algorithm: "exscan", each rank folds its part of every state; "allgather", each rank folds everything; "p2p",
            serial along the chain; "two_level", exscan inside each node and between nodes.
        wire: dtype in which states and their gradients are sent; None for that of the tensors. bfloat16 halves the
            bytes.
        node_group: for two_level, the ranks of this node, neighbours in `group`.
        cross_group: for two_level, the ranks that have this rank's place on each node.

    Settings that do not fit together raise ValueError.
    """

    chain: Chain
    group: ProcessGroup | None
    algorithm: str = "exscan"
    wire: torch.dtype | None = None
    node_group: ProcessGroup | None = None
    cross_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}, allowed: {', '.join(ALGORITHMS)}")
        if sorted(self.chain) != list(product(range(self.num_ranks), range(self.num_slots))):
            raise ValueError(f"chain must hold every slot of every rank exactly once, got {self.chain}")
        size = 1 if self.group is None else self.group.size()
        if size != self.num_ranks:
            raise ValueError(f"chain has {self.num_ranks} ranks, group {size}")
        if self.algorithm == "two_level":
            self._check_nodes()

    def _check_nodes(self) -> None:
        if self.group is None or self.node_group is None or self.cross_group is None:
            raise ValueError("two_level needs group, node_group and cross_group")
        ranks, node, cross = map(dist.get_process_group_ranks, (self.group, self.node_group, self.cross_group))
        # Ranks 4 5 of 0 .. 7 with 2 per node: node 4 5, and rank 4 has the peers 0 2 4 6.
        first = self.rank // len(node) * len(node)
        if node != ranks[first : first + len(node)] or cross != ranks[self.rank % len(node) :: len(node)]:
            raise ValueError(f"node_group {node} and cross_group {cross} do not divide group {ranks} into nodes")

    @property
    def num_ranks(self) -> int:
        """Number of context ranks."""
        return len({rank for rank, _ in self.chain})

    @property
    def num_slots(self) -> int:
        """Number of slots on each rank."""
        return len({slot for _, slot in self.chain})

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return 0 if self.group is None else self.group.rank()
