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
    """Draw a line between layers, the first on top, and their numbers (from 1), only some where there are many."""
    borders = np.cumsum([0, *sizes.values()])
    for border in borders[1:-1]:
        axes.axhline(border, color="white", linewidth=1.5)
    every = -(-len(sizes) // MOST_LABELS)
    axes.set_yticks((borders[:-1] + borders[1:])[::every] / 2, [str(layer) for layer in sizes][::every])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _edges(steps: list[int]) -> list[float]:
    """Return the borders of the columns: each column reaches from the step before to its own."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [first, *steps]


def draw_entropy(axes: Axes, run: RunLog) -> None:
    """Draw a line for each layer; deeper layers are lighter."""
    axes.set_title(run.name)
    entropies = run.entropies()
    if not entropies:
        _say_nothing(axes)
        return
    colours = matplotlib.colormaps["viridis"].resampled(len(entropies))
    for number, curve in enumerate(entropies.values()):
        _line(axes, curve, colours(number))
    num_partitions = max(len(partitions) for partitions in run.shares().values())
    axes.axhline(math.log(num_partitions), color="#555555", linestyle="--", linewidth=1)
    axes.set(ylabel="nats", ylim=(0, 1.08 * math.log(num_partitions) or 1))
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
