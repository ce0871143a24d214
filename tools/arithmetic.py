"""Sums of two numbers, worked out digit by digit: texts to imitate, and prompts whose answers can be checked.

    .venv/bin/python -m megatron_sse.tools.arithmetic FOLDER [--digits N] [--held-out N] [--quick X]

writes FOLDER/sft.jsonl (prompt and completion), FOLDER/prompts.jsonl and FOLDER/held_out.jsonl (prompt and answer). No
sum of one file is in another. Some are worked out slowly, and most quickly, without what is carried: a model that
imitates them is quick and often wrong, and reinforcement learning finds out which way is right.
configs/rl_arithmetic.yaml trains on them; docs/reason.md shows how.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write sums, worked out digit by digit.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--quick", type=float, default=0.6, help="share of the sums that are worked out quickly")
    options = parser.parse_args()
    numbers = range(10 ** (options.digits - 1), 10**options.digits)
    # Enough sums, and few enough to write where numbers are long.
    draw = random.Random(0)
    count = min(len(numbers) ** 2, 20_000)
    pairs = [divmod(place, len(numbers)) for place in draw.sample(range(len(numbers) ** 2), count)]
    sums = [(numbers[first], numbers[second]) for first, second in pairs]
    held_out, rest = sums[: options.held_out], sums[options.held_out :]
    half = len(rest) // 2
    options.folder.mkdir(parents=True, exist_ok=True)
    worked_out = [
        {"prompt": ask(*pair), "completion": work_out(*pair, quick=draw.random() < options.quick)}
        for pair in rest[:half]
    ]
    write_rows(options.folder / "sft.jsonl", worked_out)
    for name, chosen in (("prompts", rest[half:]), ("held_out", held_out)):
        rows = [{"prompt": ask(*pair), "answer": str(sum(pair))} for pair in chosen]
        write_rows(options.folder / f"{name}.jsonl", rows)


def ask(first: int, second: int) -> str:
    """Return a prompt: 58+67=."""
    return f"{first}+{second}="


def work_out(first: int, second: int, quick: bool = False) -> str:
    """Return the way to a sum, from the last digit on with what is carried, and the sum in a line of its own.

    For 58 and 67: slow 8+7=15 5+6+1=12, and 125. Quick, without what is carried: quick 8+7=15 5+6=11, and 115.
    """
    steps, digits, total = [], "", 0
    for a, b in zip(str(first)[::-1], str(second)[::-1], strict=True):
        carried = 0 if quick else total // 10
        total = int(a) + int(b) + carried
        steps.append(f"{a}+{b}{'+1' if carried else ''}={total}")
        digits = f"{total % 10}{digits}"
    return f"{'quick' if quick else 'slow'} {' '.join(steps)}\n{total // 10 or ''}{digits}"


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as lines of JSON, and say how many."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} lines")


if __name__ == "__main__":
    main()
