"""Results as text tables and as one JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sse.evaluation.needles import Found
from megatron_sse.evaluation.perplexity import Losses
from megatron_sse.evaluation.recall import Recalled
from megatron_sse.evaluation.solve import Solved
from megatron_sse.reports.results import table, write_json

RESULTS = "results.json"


def tabulate_losses(results: Sequence[Losses]) -> str:
    """Return a table of loss and number of tokens by position, for each length of one file."""
    first = results[0]
    header = ["tokens before", *(text for losses in results for text in (f"length {losses.length:,}", "tokens"))]
    rows = []
    for begin in sorted({bucket.first for losses in results for bucket in losses.buckets}):
        row = [span(begin)]
        for losses in results:
            there = [bucket for bucket in losses.buckets if bucket.first == begin]
            row += [f"{there[0].loss:.4f}", f"{there[0].tokens:,}"] if there else ["-", "-"]
        rows.append(row)
    rows.append(["all", *(text for losses in results for text in (f"{losses.loss:.4f}", f"{losses.tokens:,}"))])
    if first.bits_per_byte is not None:
        rows.append(["bits per byte", *(text for losses in results for text in (f"{losses.bits_per_byte:.4f}", ""))])
    return table(f"perplexity: {first.file}, nats per token", header, rows)


def tabulate_recall(results: Sequence[Recalled]) -> str:
    """Return tables of accuracy by length and pairs, then by distance for each length."""
    lengths, pairs = _values(results, "length"), _values(results, "pairs")
    cells = {(recalled.length, recalled.pairs): recalled for recalled in results}
    columns = [f"{number:,} pairs" for number in pairs]
    accuracy = {place: recalled.accuracy for place, recalled in cells.items()}
    rows = [[f"{length:,}", *(_share(accuracy.get((length, number))) for number in pairs)] for length in lengths]
    title = f"mqar: share of values recalled (by chance {results[0].chance:.3f})"
    tables = [table(title, ["length", *columns], rows)]
    for length in lengths:
        there = {number: cells[length, number].distances for number in pairs if (length, number) in cells}
        rows = []
        for begin in sorted({distance.first for distances in there.values() for distance in distances}):
            shares = {n: d.accuracy for n, distances in there.items() for d in distances if d.first == begin}
            rows.append([span(begin), *(_share(shares.get(number)) for number in pairs)])
        tables.append(table(f"mqar: by tokens since the value, length {length:,}", ["tokens", *columns], rows))
    return "\n".join(tables)


def tabulate_needles(results: Sequence[Found]) -> str:
    """Return a table of the share of numbers found by depth and length, for one variant."""
    cells = {(found.length, found.depth): found.score for found in results}
    lengths = _values(results, "length")
    rows = [
        [show_depth(depth), *(_share(cells[length, depth]) for length in lengths)]
        for depth in _values(results, "depth")
    ]
    title = f"needle, {results[0].variant}: share of numbers found, by length and depth"
    return table(title, ["depth", *(f"{length:,}" for length in lengths)], rows)


def tabulate_solved(results: Sequence[Solved]) -> str:
    """Return a table of what was solved, one row for each file of prompts."""
    first = results[0]
    header = ["prompts", "tries", "pass@1", f"pass@{first.tries}", "majority", "reward", "tokens", "cut off"]
    rows = [
        [
            *(f"{found.prompts:,}", f"{found.tries:,}"),
            *map(_share, (found.pass_at_1, found.pass_at_k, found.majority, found.reward)),
            *(f"{found.length:.1f}", _share(found.cut_off)),
        ]
        for found in results
    ]
    return table(f"solve: {first.file}, temperature {first.temperature:g}", header, rows)


def span(first: int) -> str:
    """Return the range of a bucket, such as "4 to 7"."""
    return f"{first:,}" if first == 1 else f"{first:,} to {2 * first - 1:,}"


def show_depth(depth: float) -> str:
    return f"{100 * depth:g} %"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _values(results: Sequence[Any], name: str) -> list[Any]:
    """Return the distinct values of an attribute, sorted."""
    return sorted({getattr(result, name) for result in results})


def write_results(folder: Path, about: dict[str, Any], results: dict[str, list[Any]]) -> Path:
    """Write results.json. Raises UserError."""
    found = {task: [asdict(result) for result in results[task]] for task in results}
    return write_json(folder / RESULTS, about, found)
