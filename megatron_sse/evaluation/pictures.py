"""Pictures of results, as PNG files; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_sse.evaluation.needles import Found
from megatron_sse.evaluation.perplexity import Bucket, Losses
from megatron_sse.evaluation.recall import Recalled
from megatron_sse.evaluation.report import show_depth
from megatron_sse.reports.style import save_picture


def draw_losses(path: Path, results: Sequence[Losses]) -> None:
    """Draw a line for each length: the loss by number of tokens before, in a band of two standard errors."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for losses in results:
        buckets = [bucket for bucket in losses.buckets if is_filled(bucket, losses.length)]
        firsts, means = [bucket.first for bucket in buckets], [bucket.loss for bucket in buckets]
        [line] = axes.plot(firsts, means, marker="o", label=f"pieces of {losses.length:,}")
        low, high = ([bucket.loss + sign * bucket.error for bucket in buckets] for sign in (-2, 2))
        axes.fill_between(firsts, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens before, from this many to twice as many")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(results[0].file)
    axes.grid(alpha=0.3)
    axes.legend(title="band: two standard errors")
    save_picture(figure, path, dpi=120)


def is_filled(bucket: Bucket, length: int) -> bool:
    """Check whether pieces of `length` reach half of a bucket's numbers of tokens; the last one may hold a single."""
    reached = min(2 * bucket.first - 1, length) - bucket.first + 1
    return 2 * reached >= bucket.first


def draw_recall(path: Path, results: Sequence[Recalled]) -> None:
    """Draw accuracy by length and number of pairs."""
    cells = {(f"{recalled.length:,}", f"{recalled.pairs:,}"): recalled.accuracy for recalled in results}
    columns = [f"{length:,}" for length in sorted({recalled.length for recalled in results})]
    rows = [f"{pairs:,}" for pairs in sorted({recalled.pairs for recalled in results})]
    _draw_map(path, "mqar: share of values recalled", columns, rows, cells, "length in tokens", "pairs")


def draw_needles(path: Path, results: Sequence[Found]) -> None:
    """Draw the share of numbers found by length and depth, for one variant."""
    cells = {(f"{found.length:,}", show_depth(found.depth)): found.score for found in results}
    columns = [f"{length:,}" for length in sorted({found.length for found in results})]
    rows = [show_depth(depth) for depth in sorted({found.depth for found in results})]
    title = f"needle, {results[0].variant}: share of numbers found"
    _draw_map(path, title, columns, rows, cells, "length in tokens", "depth of the first number")


def _draw_map(
    path: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Mapping[tuple[str, str], float],
    column_name: str,
    row_name: str,
) -> None:
    """Draw a heat map of shares by (column, row) with their numbers; missing cells stay white."""
    figure = Figure(figsize=(2.5 + 0.9 * len(columns), 1.8 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [[cells.get((column, row), float("nan")) for column in columns] for row in rows]
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (column, row), value in cells.items():
        # Black text on light cells, white text on dark ones.
        colour = "black" if value > 0.6 else "white"
        place = columns.index(column), rows.index(row)
        axes.text(*place, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_name)
    axes.set_ylabel(row_name)
    axes.set_title(title, wrap=True)
    figure.colorbar(picture)
    save_picture(figure, path, dpi=120)
