"""Which tokens of a sequence each context rank holds.

A slot is a run of consecutive tokens on a rank. Contiguous: one slot a rank, in rank order. Zigzag: the sequence is cut
into 2 * size chunks, rank r holds chunks r and 2 * size - 1 - r, so that causal attention costs every rank the same.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

# Pairs of a query and a key that torch's attention masks at once; for more it takes the queries in chunks.
MASKED_PAIRS = 1 << 25

# (rank, slot) of every slot, in the order of the sequence.
Chain = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ContextShard:
    """The part of every sequence that context rank `rank` of `size` holds."""

    rank: int = 0
    size: int = 1
    zigzag: bool = False

    @property
    def num_slots(self) -> int:
        """Slots on each rank."""
        return 2 if self.zigzag else 1

    @property
    def chain(self) -> Chain:
        """All slots in the order of the sequence: (0, 0), (1, 0), (1, 1), (0, 1) for two ranks in zigzag."""
        forward = tuple((rank, 0) for rank in range(self.size))
        backward = tuple((rank, 1) for rank in reversed(range(self.size)))
        return forward + backward if self.zigzag else forward

    def chain_of_parts(self, num_parts: int) -> Chain:
        """Return the chain of the parts that `num_parts` tensor ranks hold of each context rank's tokens.

        A part is a slot of its own: (rank, 0), with ranks that count through the parts of a context rank first. No part
        may lie in two slots. For two context ranks in zigzag with two parts each, context rank 0 is the ranks 0 (its
        first slot) and 1 (its second), context rank 1 the ranks 2 and 3: (0, 0), (2, 0), (3, 0), (1, 0).
        """
        assert num_parts % self.num_slots == 0
        per_slot = num_parts // self.num_slots
        return tuple(
            (rank * num_parts + slot * per_slot + part, 0) for rank, slot in self.chain for part in range(per_slot)
        )

    def columns(self, length: int) -> np.ndarray:
        """Return the positions of this rank's tokens in a sequence of `length` tokens, slot after slot.

        `length` has to be a multiple of size * num_slots (the configuration checks it). With 8 tokens and two ranks in
        zigzag: 0 1 6 7 on rank 0 and 2 3 4 5 on rank 1.
        """
        return self._columns_of(self.rank, length)

    def all_columns(self, length: int) -> np.ndarray:
        """Return the positions of all ranks' tokens, one rank after the other."""
        return np.concatenate([self._columns_of(rank, length) for rank in range(self.size)])

    def _columns_of(self, rank: int, length: int) -> np.ndarray:
        assert length % (self.size * self.num_slots) == 0
        # Two ranks and 8 tokens in zigzag: chunks 0 1 | 2 3 | 4 5 | 6 7, of which rank 0 owns the first and the last.
        chunks = np.arange(length).reshape(self.size * self.num_slots, -1)
        own = [rank, 2 * self.size - 1 - rank] if self.zigzag else [rank]
        return chunks[own].reshape(-1)


# All tokens on one rank.
ALL_TOKENS = ContextShard()


def node_runs(chain: Chain, node_size: int) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Cut the chain where it changes nodes: (node, number of the run there), [(place on the node, slot), ...].

    For example, four ranks in zigzag on nodes of two visit the ranks 0 1 2 3 3 2 1 0, so there are three runs: (0, 0)
    with ranks 0 1, (1, 0) with ranks 2 3 3 2, and (0, 1) with ranks 1 0.
    """
    runs: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []
    for node, slots in groupby(chain, key=lambda entry: entry[0] // node_size):
        number = sum(place[0] == node for place, _ in runs)
        runs.append(((node, number), [(rank % node_size, slot) for rank, slot in slots]))
    return runs
