"""Prints markdown tables of a hand-off: bytes beside those of ring attention, and times by the model of `plan`.

    python -m megatron_sse.tools.handoff_table [--heads 16 --head-dim 128 --kv-heads 4]

The numbers of the hand-off are those of `handoff_bytes`, which tests compare with counted traffic. Ring attention
passes keys and values (bf16) around the ring in the forward pass, and again with their gradients in the backward pass.
"""

import argparse

from megatron_sse.costs.gpus import GPUS, GPUS_PER_NODE, Gpu
from megatron_sse.parallel.handoff_bytes import handoff_bytes
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.planning.hand_off import ALGORITHMS, NETWORK_LATENCY, NETWORK_MESSAGE, NETWORK_SHARE, Links
from megatron_sse.planning.sizes import FP32

MIB = 2**20
# For the table of times: one large layer, on many machines.
LARGE_HEADS, LARGE_PARTITIONS = 32, 64
MANY = (16, 64, 256, 1024)
TOKENS = (1024, 16 * 1024, 128 * 1024, 1024 * 1024)
SIZES = (2, 8, 64)


def ring_bytes(tokens: int, size: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes that a rank of ring attention sends, forward plus backward, for a sequence of `tokens`."""
    # Keys and values, 2 bytes each.
    one_turn = tokens // size * 2 * kv_heads * head_dim * 2
    # One turn forward, two backward: keys and values again, and their gradients.
    return (size - 1) * 3 * one_turn


def handoff_row(num_partitions: int, matrix: bool, algorithm: str, heads: int, head_dim: int, zigzag: bool) -> str:
    """Return one row: name, then MiB forward plus backward by number of ranks."""
    cells = []
    for size in SIZES:
        chain = ContextShard(0, size, zigzag).chain
        sent = handoff_bytes(chain, 0, (1 + num_partitions) * heads, head_dim, head_dim, matrix, algorithm)
        cells.append(f"{sum(sent) / MIB:,.1f}")
    layout = "zigzag" if zigzag else "contiguous"
    name = f"{'GDN' if matrix else 'GLA'}, N = {num_partitions}, {algorithm}, {layout}"
    return f"| {name} | any | {' | '.join(cells)} |"


def time_row(size: int, matrix: bool, head_dim: int, gpu: Gpu) -> str:
    """Return one row: milliseconds of a forward pass by algorithm, and MiB that a rank sends to other machines."""
    units = (1 + LARGE_PARTITIONS) * LARGE_HEADS
    state = FP32 * units * head_dim * head_dim
    transition = state if matrix else state // head_dim
    links = Links(gpu, size, GPUS_PER_NODE)
    seconds = [links.seconds(name, transition, state) for name in ALGORITHMS] + [pipelined_ring(size, state, gpu)]
    chain = ContextShard(0, size).chain
    inside = handoff_bytes(ContextShard(0, GPUS_PER_NODE).chain, 0, units, head_dim, head_dim, matrix)[0]
    sent = handoff_bytes(chain, 0, units, head_dim, head_dim, matrix, "two_level", node_size=GPUS_PER_NODE)[0]
    far = (size - GPUS_PER_NODE) / (size - 1)
    crossing = [handoff_bytes(chain, 0, units, head_dim, head_dim, matrix)[0] * far, sent - inside]
    cells = [f"{1000 * value:,.2f}" for value in seconds] + [f"{value / MIB:,.0f}" for value in crossing]
    return f"| {'GDN' if matrix else 'GLA'} | {size:,} | {' | '.join(cells)} |"


def pipelined_ring(size: int, state: float, gpu: Gpu) -> float:
    """Return the seconds of the chain with states in pieces, each sent on at once (ZeCO, arXiv 2507.01004), with the
    best number of pieces."""
    hop, speed = NETWORK_LATENCY + 2 * NETWORK_MESSAGE, NETWORK_SHARE * gpu.network
    return min((size - 2 + pieces) * (hop + state / pieces / speed) for pieces in (2**power for power in range(10)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes sent per context rank, layer and micro-batch")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=4)
    args = parser.parse_args()
    print(f"| MiB forward + backward | tokens | {' | '.join(f'{size} ranks' for size in SIZES)} |")
    print(f"|---|---|{'---|' * len(SIZES)}")
    for matrix in (False, True):
        for num_partitions in (4, 16, 64):
            print(handoff_row(num_partitions, matrix, "exscan", args.heads, args.head_dim, False))
    print(handoff_row(4, False, "exscan", args.heads, args.head_dim, True))
    print(handoff_row(4, False, "allgather", args.heads, args.head_dim, False))
    for tokens in TOKENS:
        cells = [f"{ring_bytes(tokens, size, args.kv_heads, args.head_dim) / MIB:,.1f}" for size in SIZES]
        print(f"| ring attention, {args.kv_heads} key heads | {tokens:,} | {' | '.join(cells)} |")
    gpu = GPUS["h100"]
    print(f"\n{LARGE_HEADS} heads of {args.head_dim}, N = {LARGE_PARTITIONS}; {GPUS_PER_NODE} x {gpu.name} a machine\n")
    columns = ["ms forward", "ranks", *ALGORITHMS, "pipelined ring", "MiB between machines: exscan", "two_level"]
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for matrix in (False, True):
        for size in MANY:
            print(time_row(size, matrix, args.head_dim, gpu))


if __name__ == "__main__":
    main()
