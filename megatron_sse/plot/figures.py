"""The pictures: curves of all runs in one plot, and plots of the single runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from megatron_sse.plot.layouts import draw_layout, find_layout, layout_legend
from megatron_sse.plot.loads import draw_entropy, draw_loads
from megatron_sse.plot.read import Curve, RunLog
from megatron_sse.reports.style import COLOURS, STYLE, label_steps, save_picture

WIDTH, HEIGHT = 6.4, 3.6
COLUMNS = 3
# Points of validation losses.
VALIDATION: dict[str, Any] = {"linestyle": "", "marker": "o", "mec": "white", "ms": 6, "zorder": 4}
# A curve with at least this many points is drawn faint, with its running mean.
MANY = 40


@dataclass(frozen=True)
class Picture:
    """A PNG file with its title and note. wide: it has several plots side by side."""

    path: Path
    title: str
    note: str
    wide: bool = False


@dataclass(frozen=True)
class CurvePlot:
    """A plot of one quantity over the steps, with all runs in it."""

    name: str
    title: str
    note: str
    tag: str
    unit: str
    smooth: bool = False
    log: bool = False
    from_zero: bool = False


CURVE_PLOTS = [
    CurvePlot(
        "loss",
        "Loss",
        "Faint: each step; line: running mean.",
        "train/loss",
        "nats per token",
        smooth=True,
    ),
    CurvePlot(
        "reward",
        "Reward",
        "Mean over the answers of a step. Faint: each step; line: running mean.",
        "rl/reward",
        "reward",
        smooth=True,
    ),
    CurvePlot(
        "pass_at_1",
        "Held-out problems solved",
        "Share that the likeliest tokens solve.",
        "validation/pass_at_1",
        "pass@1",
        from_zero=True,
    ),
    CurvePlot("answers", "Length of answers", "", "rl/length", "tokens", smooth=True, from_zero=True),
    CurvePlot(
        "logprob_error",
        "Generation against training",
        "How far the probabilities of a token differ, as a factor; 1 is best.",
        "rl/logprob_error",
        "factor",
    ),
    CurvePlot("learning_rate", "Learning rate", "", "optimizer/learning_rate", "learning rate", from_zero=True),
    CurvePlot(
        "grad_norm",
        "Gradient norm",
        "Before clipping. Faint: each step; line: running mean.",
        "optimizer/grad_norm",
        "norm",
        smooth=True,
        log=True,
    ),
    CurvePlot(
        "throughput",
        "Throughput",
        "Tokens of all processes; the time of validation and saving is not counted.",
        "speed/tokens_per_second",
        "tokens per second",
        from_zero=True,
    ),
    CurvePlot(
        "memory",
        "Memory",
        "Peak so far of the first process: memory allocated on its GPU, or resident memory on a CPU.",
        "memory/peak_gib",
        "GiB",
        from_zero=True,
    ),
]


def draw_all(runs: list[RunLog], folder: Path) -> list[Picture]:
    """Draw every picture for which the runs have data."""
    with matplotlib.rc_context(STYLE):
        pictures = [_draw_curves(plot, runs, folder) for plot in CURVE_PLOTS if any(r.curve(plot.tag) for r in runs)]
        if any(run.shares() for run in runs):
            note = "Each partition's share of the writes times the number of partitions: 1 where all get the same."
            pictures.append(_draw_side_by_side(runs, draw_loads, folder / "partition_load.png", "Partition load", note))
        if any(run.entropies() for run in runs):
            note = "How far the entropy of the probabilities is below ln N. 0: all partitions equally likely; "
            note += "ln N: always the same one."
            pictures.append(
                _draw_side_by_side(
                    runs, draw_entropy, folder / "router_entropy.png", "Router entropy: how far below ln N", note
                )
            )
        pictures.append(_draw_layouts(runs, folder / "layouts.png"))
    return pictures


def _draw_curves(plot: CurvePlot, runs: list[RunLog], folder: Path) -> Picture:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        curve = [(step, value) for step, value in run.curve(plot.tag) if math.isfinite(value)]
        # Dashed once the colours are used up.
        style = "-" if number < len(COLOURS) else "--"
        # Curves of similar runs cover each other: the first ones are drawn wider, to remain visible.
        width = 1.5 if plot.smooth else 1.5 + 1.2 * min(3, len(runs) - 1 - number)
        line = {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": width}
        _draw_curve(axes, curve, run.name, line, plot.smooth)
        if plot.name == "loss":
            axes.plot(*_columns(run.curve("validation/loss")), color=line["color"], **VALIDATION)
    axes.set(ylabel=plot.unit, title=plot.title)
    label_steps(axes)
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    if plot.name == "throughput":
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    entries, names = axes.get_legend_handles_labels()
    if plot.name == "loss" and any(run.curve("validation/loss") for run in runs):
        # One entry for all runs, whose points have the colours of their lines.
        entries, names = [*entries, Line2D([], [], color="#777777", **VALIDATION)], [*names, "validation"]
    figure.legend(entries, names, loc="outside lower center", ncols=min(COLUMNS, len(names)))
    path = folder / f"{plot.name}.png"
    save_picture(figure, path)
    return Picture(path, plot.title, plot.note)


def _draw_curve(axes: Axes, curve: Curve, name: str, line: dict[str, Any], smooth: bool) -> None:
    steps, values = _columns(curve)
    if smooth and len(values) >= MANY:
        axes.plot(steps, values, **{**line, "linewidth": 0.8, "alpha": 0.3})
        values = running_mean(values)
    # A single point has no line, so it gets a marker.
    axes.plot(steps, values, label=name, marker="." if len(values) == 1 else "", **line)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def running_mean(values: list[float]) -> list[float]:
    """Return the exponential running mean over about a thirtieth of the points, without a bias to the first."""
    keep = 1 - 30 / max(len(values), 60)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _draw_layouts(runs: list[RunLog], path: Path) -> Picture:
    note = "Each box is a process with its rank, each row a pipeline stage with its layers."
    height = 1.5 + 0.55 * max(find_layout(run).pipeline for run in runs)
    return _draw_side_by_side(runs, draw_layout, path, "Layouts", note, height, layout_legend(runs))


def _draw_side_by_side(
    runs: list[RunLog],
    draw: Callable[[Axes, RunLog], None],
    path: Path,
    title: str,
    note: str,
    height: float = HEIGHT,
    legend: Sequence[Patch] = (),
) -> Picture:
    """Draw a plot of each run, up to three in a row, each `height` inches high."""
    columns = 2 if len(runs) == 4 else min(COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH if columns == 1 else 2 * WIDTH, height * rows), layout="constrained")
    figure.suptitle(title)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, run in zip(all_axes, runs, strict=False):
        draw(axes, run)
    for axes in all_axes[len(runs) :]:
        axes.axis("off")
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 2 * columns + 2))
    save_picture(figure, path)
    return Picture(path, title, note, wide=columns > 1)
