"""Plots of a run's routers: each partition's share of the writes, and the entropy of the routers."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm

from megatron_sse.plot.read import Curve, RunLog
from megatron_sse.reports.style import SHARE_NORM, label_steps

MOST_LABELS = 12
# Rows of a heat map that can be numbered.
MOST_ROWS = 40


def draw_loads(axes: Axes, run: RunLog) -> None:
    """Draw a heat map with a row for each partition, grouped by layer; the colour is the share times their number."""
    axes.set_title(run.name)
    shares = run.shares()
    if not shares:
        _say_nothing(axes)
        return
    rows = [(layer, partition) for layer in shares for partition in shares[layer]]
    steps = sorted({step for layer in shares.values() for curve in layer.values() for step, _ in curve})
    load = np.full((len(rows), len(steps)), np.nan)
    column = {step: number for number, step in enumerate(steps)}
    for number, (layer, partition) in enumerate(rows):
        for step, share in shares[layer][partition]:
            load[number, column[step]] = share * len(shares[layer])
    mesh = axes.pcolormesh(_edges(steps), np.arange(len(rows) + 1), load, cmap="RdBu_r", norm=SHARE_NORM)
    axes.figure.colorbar(mesh, ax=axes, label="load", ticks=[0, 0.5, 1, 1.5, 2], extend="max")
    _label_layers(axes, {layer: len(partitions) for layer, partitions in shares.items()})
    axes.set_ylabel("layer, its partitions")
    label_steps(axes)
    axes.grid(False)


def _label_layers(axes: Axes, sizes: dict[int, int]) -> None:
    """Draw a line between layers, the first on top, with the numbers of layers and, where there is room, of their
    partitions (both from 1)."""
    borders = np.cumsum([0, *sizes.values()])
    for border in borders[1:-1]:
        axes.axhline(border, color="white", linewidth=1.5)
    every = -(-len(sizes) // MOST_LABELS)
    axes.set_yticks((borders[:-1] + borders[1:])[::every] / 2, [str(layer) for layer in sizes][::every])
    axes.tick_params(axis="y", length=0)
    if borders[-1] <= MOST_ROWS:
        numbers = [str(number + 1) for size in sizes.values() for number in range(size)]
        axes.set_yticks(np.arange(borders[-1]) + 0.5, numbers, minor=True)
        axes.tick_params(axis="y", which="minor", length=0, labelsize=6, labelcolor="#555555")
        # Left of the partitions' numbers.
        axes.tick_params(axis="y", which="major", pad=16)
    axes.invert_yaxis()


def _edges(steps: list[int]) -> list[float]:
    """Return the borders of the columns: each column reaches from the step before to its own."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [first, *steps]


def draw_entropy(axes: Axes, run: RunLog) -> None:
    """Draw how far each layer's entropy is below ln N: routers near ln N differ, too. Deeper layers are lighter."""
    axes.set_title(run.name)
    entropies = run.entropies()
    if not entropies:
        _say_nothing(axes)
        return
    most = {layer: math.log(len(partitions)) for layer, partitions in run.shares().items()}
    colours = matplotlib.colormaps["viridis"].resampled(len(entropies))
    for number, (layer, curve) in enumerate(entropies.items()):
        _line(axes, [(step, most[layer] - value) for step, value in curve], colours(number))
    axes.set_ylabel("ln N - entropy, nats")
    axes.set_ylim(bottom=0)
    highest = max(most.values())
    if axes.get_ylim()[1] > 0.7 * highest:
        axes.axhline(highest, color="#555555", linestyle="--", linewidth=1)
        axes.set_ylim(top=1.08 * highest or 1)
    label_steps(axes)
    layers = list(entropies)
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer")
    every = -(-len(layers) // MOST_LABELS)
    bar.set_ticks(list(range(len(layers)))[::every], labels=[str(layer) for layer in layers][::every])


def _line(axes: Axes, curve: Curve, colour: tuple[float, ...]) -> None:
    axes.plot(
        [step for step, _ in curve],
        [value for _, value in curve],
        color=colour,
        linewidth=1.4,
        marker="." if len(curve) == 1 else "",
    )


def _say_nothing(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "no partitions", ha="center", va="center", color="#555555", transform=axes.transAxes)
