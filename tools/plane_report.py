"""Report of the study of recall against state: a table and a plot of all results in a folder; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from megatron_sse.reports.style import save_picture
from megatron_sse.tools.plane_arms import ARMS, PAIRS, WAYS
from megatron_sse.tools.studies.rates import choose_rates
from megatron_sse.tools.studies.results import Result, mean_cpu_seconds, write_tables


def write_report(output: Path, found: dict[str, list[Result]]) -> str:
    """Write report.md, results.json and the plot, and return the report."""
    best = choose_rates(found, output)
    text = _tabulate(found, best)
    write_tables(output, found, text)
    draw_plane(output / "plane.png", best)
    return text


def _tabulate(found: dict[str, list[Result]], best: dict[str, list[Result]]) -> str:
    runs = [result for results in found.values() for result in results]
    commits = sorted({result["commit"] for result in runs})
    lines = [
        f"{len(runs)} runs. Commits: {', '.join(commits)}. State: elements of a layer, of which a token writes and "
        "reads those touched. Cost: processor ms per 1,000 tokens of training.",
        "",
        "| pairs | state | by | touched | parameters | learning rate | recalled, by seed | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, results in best.items():
        cell = ARMS[arm]
        accuracies = ", ".join(f"{result['accuracy']:.3f}" for result in results)
        seconds = mean_cpu_seconds(results)
        cost = "-" if seconds is None else f"{seconds / results[0]['tokens'] * 1e6:.0f}"
        lines.append(
            f"| {cell.pairs} | {cell.state:,} | {cell.way} | {cell.touched:,} | {results[0]['parameters']:,} "
            f"| {results[0]['learning_rate']:g} | {accuracies} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def draw_plane(path: Path, best: dict[str, list[Result]]) -> None:
    """Draw recall against the state of a layer and against what a token touches of it; every seed is a point."""
    figure = Figure(figsize=(4 * len(PAIRS), 6), layout="constrained")
    grid = figure.subplots(2, len(PAIRS), sharey=True, squeeze=False)
    for column, pairs in enumerate(PAIRS):
        for row, (name, words) in enumerate(
            (("state", "state elements"), ("touched", "elements that a token touches"))
        ):
            axes = grid[row][column]
            for number, way in enumerate(WAYS):
                cells = {arm: ARMS[arm] for arm in best if (ARMS[arm].pairs, ARMS[arm].way) == (pairs, way)}
                points = [(getattr(cell, name), r["accuracy"]) for arm, cell in cells.items() for r in best[arm]]
                if points:
                    axes.plot(*zip(*points, strict=True), "os^"[number], color=f"C{number}", alpha=0.7, label=way)
            axes.set_xscale("log", base=2)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlabel(f"{words} of a layer")
            axes.set_title(f"{pairs} pairs")
            axes.grid(alpha=0.3)
        grid[0][0].set_ylabel("share of values recalled")
    if grid[0][0].get_legend_handles_labels()[0]:
        grid[0][0].legend()
    save_picture(figure, path)
