"""The bytes that a hand-off sends, computed from sizes alone."""

from itertools import pairwise

from megatron_sse.parallel.sharding import Chain, node_runs


def handoff_bytes(
    chain: Chain,
    rank: int,
    units: int,
    key_dim: int,
    value_dim: int,
    matrix: bool,
    algorithm: str = "exscan",
    element_bytes: int = 4,
    wire_bytes: int | None = None,
    node_size: int = 1,
) -> tuple[int, int]:
    """Return the bytes that `rank` sends to other ranks in one hand-off: (forward, backward), padding included.

    units, key_dim, value_dim: U, K and V there; matrix: transitions are [K, K]. element_bytes: bytes of an element of
    the tensors; wire_bytes: of a state's element as it is sent, where that differs. node_size: ranks of a node, for
    two_level.
    """
    # `slots` and `runs` count the rows that leave this rank. exscan, for one, sends each row's transition and state to
    # its owner and an entering state back (transition + 2 state); backward sends no transitions (2 state). two_level
    # does the same with slots inside a node, and with runs of slots between nodes.
    num_ranks, num_slots = len({rank for rank, _ in chain}), len({slot for _, slot in chain})
    rows, row_elements = (units, key_dim) if matrix else (units * key_dim, 1)
    state = row_elements * value_dim * (wire_bytes or element_bytes)
    transition = row_elements * row_elements * element_bytes
    if algorithm == "p2p" or num_ranks == 1:
        sends = sum(here[0] == rank != there[0] for here, there in pairwise(chain))
        returns = sum(there[0] == rank != here[0] for here, there in pairwise(chain))
        return sends * rows * state, returns * rows * state
    if algorithm == "allgather":
        slots = (num_ranks - 1) * num_slots * rows
        return slots * (transition + state), slots * state
    if algorithm == "exscan":
        slots = (num_ranks - 1) * num_slots * -(-rows // num_ranks)
        return slots * (transition + 2 * state), slots * 2 * state
    assert algorithm == "two_level"
    part = -(-rows // node_size)
    slots = (node_size - 1) * num_slots * part
    nodes = num_ranks // node_size
    runs = (nodes - 1) * (1 + max(number for (_, number), _ in node_runs(chain, node_size))) * -(-part // nodes)
    return (slots + runs) * (transition + 2 * state), (slots + runs) * 2 * state
