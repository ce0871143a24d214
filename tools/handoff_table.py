"""Prints a markdown table of bytes that a context rank sends per layer and micro-batch: hand-off and ring attention.

    python -m megatron_sse.tools.handoff_table [--heads 16 --head-dim 128 --kv-heads 4]

The numbers of the hand-off are those of `handoff_bytes`, which tests compare with counted traffic. Ring attention
passes keys and values (bf16) around the ring in the forward pass, and again with their gradients in the backward pass.
"""

import argparse

from megatron_sse.parallel.handoff import handoff_bytes
from megatron_sse.parallel.sharding import ContextShard

MIB = 2**20
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


if __name__ == "__main__":
    main()
