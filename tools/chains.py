"""Chains of sums, each of the last two digits before it: long texts to imitate, and prompts with known answers.

    .venv/bin/python -m megatron_sse.tools.chains FOLDER [--held-out N] [--quick X]

writes the files that megatron_sse.tools.arithmetic writes. Answers have 200 to 540 tokens of one byte each. Some chains
are worked out slowly and rightly. Most are worked out quickly, and leave out the last sum where the number asked for is
odd. Two of three texts to imitate are short, since each text shows only once how to begin. configs/rl_chains.yaml
trains on them; docs/reason.md shows how.
"""

import argparse
import random
from itertools import product
from pathlib import Path

from megatron_sse.tools.arithmetic import write_rows

DIGITS = range(10)
# Numbers of sums, and those of the short texts.
COUNTS, SHORT_COUNTS = range(22, 60), (2, 3, 4, 5, 6, 11, 12, 13)
# Short texts for each long one.
SHORT = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Write chains of sums, each of the last two digits before it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--quick", type=float, default=0.6, help="share of the chains that are worked out quickly")
    options = parser.parse_args()
    draw = random.Random(0)
    chains = list(product(DIGITS, DIGITS, COUNTS))
    draw.shuffle(chains)
    held_out, rest = chains[: options.held_out], chains[options.held_out :]
    half = len(rest) // 2
    options.folder.mkdir(parents=True, exist_ok=True)
    short = draw.choices(list(product(DIGITS, DIGITS, SHORT_COUNTS)), k=SHORT * half)
    worked_out = [
        {"prompt": ask(*chain), "completion": work_out(*chain, quick=draw.random() < options.quick)}
        for chain in [*rest[:half], *short]
    ]
    write_rows(options.folder / "sft.jsonl", worked_out)
    for name, chosen in (("prompts", rest[half:]), ("held_out", held_out)):
        rows = [{"prompt": ask(*chain), "answer": work_out(*chain)[-1]} for chain in chosen]
        write_rows(options.folder / f"{name}.jsonl", rows)


def ask(first: int, second: int, count: int) -> str:
    """Return a prompt, two digits and the number of sums: 7,8,33=."""
    return f"{first},{second},{count:02}="


def work_out(first: int, second: int, count: int, quick: bool = False) -> str:
    """Return the last digits of the sums, counted down, and the last one in a line of its own.

    For 7, 8 and 3 sums: slow 03:7+8=5 02:8+5=3 01:5+3=8, and 8. Quick, 2 sums: quick 02:7+8=5 01:8+5=3, and 3.
    """
    steps = []
    for left in range(count - count % 2 if quick else count, 0, -1):
        after = (first + second) % 10
        steps.append(f"{left:02}:{first}+{second}={after}")
        first, second = second, after
    return f"{'quick' if quick else 'slow'} {' '.join(steps)}\n{second}"


if __name__ == "__main__":
    main()
