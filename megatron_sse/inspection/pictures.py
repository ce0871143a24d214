"""Pictures of the measures, as PNG files; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from megatron_sse.inspection.half_life import Spread
from megatron_sse.inspection.measure import Layer, Rank
from megatron_sse.inspection.report import mean_of, partitions_of, reads_elsewhere
from megatron_sse.reports.style import COLOURS, SHARE_NORM, STYLE, save_picture

# Rows with more cells than this show no numbers.
_MOST_NUMBERS = 16
# In the order of their colours.
_BANKS = ("shared bank", "partitions")


def draw_all(folder: Path, layers: Sequence[Layer]) -> None:
    """Draw partitions.png (for models with partitions), rank.png and half_life.png."""
    with matplotlib.rc_context(STYLE):
        if partitions_of(layers):
            _draw_partitions(folder / "partitions.png", layers)
        _draw_ranks(folder / "rank.png", layers)
        _draw_half_lives(folder / "half_life.png", layers)


def _draw_partitions(path: Path, layers: Sequence[Layer]) -> None:
    """Draw heat maps of the shares of writes and, where they differ, of reads."""
    num_partitions = partitions_of(layers)
    titles = ["share of the writes", "share of the reads"] if reads_elsewhere(layers) else ["share of writes and reads"]
    figure = _figure(layers, len(titles), num_partitions)
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        share_lN = np.full((len(layers), num_partitions), np.nan)
        for row, layer in enumerate(layers):
            if layer.use is not None:
                of_reads = title == titles[-1] and len(titles) > 1
                share_N = layer.use.read_share_N if of_reads else layer.use.write_share_N
                share_lN[row, : len(share_N)] = share_N
        # Scaled by the number of partitions, so that an even share is 1, the middle of the colours.
        picture = axes.imshow(share_lN * num_partitions, cmap="RdBu_r", norm=SHARE_NORM, aspect="auto")
        _write_numbers(axes, share_lN, dark_lN=np.abs(share_lN * num_partitions - 1) > 0.6)
        _label_rows(axes, layers)
        axes.set(title=title, xlabel="partition")
        step = -(-num_partitions // _MOST_NUMBERS)
        axes.set_xticks(range(0, num_partitions, step), [str(n + 1) for n in range(0, num_partitions, step)])
        figure.colorbar(picture, ax=axes, label="share x number of partitions", ticks=[0, 0.5, 1, 1.5, 2], extend="max")
    save_picture(figure, path)


def _draw_ranks(path: Path, layers: Sequence[Layer]) -> None:
    """Draw ranks by bank at the end, and by layer as the text is read."""
    num_banks = 1 + partitions_of(layers)
    figure = _figure(layers, 2, num_banks)
    left, right = figure.subplots(1, 2)
    rank_lA = np.full((len(layers), num_banks), np.nan)
    for row, layer in enumerate(layers):
        if layer.end is not None:
            rank_lA[row, 0] = math.nan if layer.end.shared is None else layer.end.shared
            rank_lA[row, 1 : 1 + len(layer.end.partition_N)] = layer.end.partition_N
    most = max(layer.most or 0 for layer in layers)
    largest = np.nanmax(rank_lA)
    picture = left.imshow(rank_lA, vmin=0, vmax=largest or 1, cmap="viridis", aspect="auto")
    _write_numbers(left, rank_lA, dark_lN=rank_lA < 0.6 * largest, digits=1)
    _label_rows(left, layers)
    step = -(-num_banks // _MOST_NUMBERS)
    names = ["shared", *(str(number) for number in range(1, num_banks))]
    left.set_xticks(range(0, num_banks, step), names[::step])
    left.set(title=f"effective rank at the end, at most {most}", xlabel="bank")
    figure.colorbar(picture, ax=left)
    _draw_growth(right, layers)
    save_picture(figure, path)


def _draw_growth(axes: Axes, layers: Sequence[Layer]) -> None:
    """Draw two lines for each layer (shared bank, mean of partitions), deeper layers lighter."""
    there = [layer for layer in layers if layer.growth]
    colours = matplotlib.colormaps["viridis"].resampled(len(there) + 1)
    for number, layer in enumerate(there):
        for name, style, ranks in (
            ("shared", "o-", [rank for rank in layer.growth if rank.shared is not None]),
            ("partitions' mean", "s--", [rank for rank in layer.growth if rank.partition_N]),
        ):
            values = [_value(rank, name) for rank in ranks]
            label = f"layer {layer.layer}, {name}" if len(there) <= 4 else name if not number else None
            if ranks:
                tokens = [rank.tokens for rank in ranks]
                axes.plot(tokens, values, style, ms=4, color=colours(number), label=label)
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title="as the text is read; deeper layers are lighter", xlabel="tokens", ylabel="effective rank")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _value(rank: Rank, name: str) -> float:
    return rank.shared if name == "shared" and rank.shared is not None else mean_of(rank)


def _draw_half_lives(path: Path, layers: Sequence[Layer]) -> None:
    """Draw for each layer the range from the 10th to the 90th percentile and the median: those in tokens in one plot,
    those in writes to a partition in another."""
    kinds = {
        "tokens": [("shared bank", lambda memory: memory.shared), ("partitions", lambda memory: memory.sparse_tokens)],
        "writes": [("partitions", lambda memory: memory.sparse_writes)],
    }
    found = {
        unit: {
            name: {layer.layer: spread for layer in layers if layer.half_life and (spread := get(layer.half_life))}
            for name, get in parts
        }
        for unit, parts in kinds.items()
    }
    # Models without partitions have none in writes.
    found = {unit: parts for unit, parts in found.items() if unit == "tokens" or any(parts.values())}
    width = max(5.0, 2 + 0.5 * len(layers))
    figure = Figure(figsize=(width * len(found), 4), layout="constrained")
    figure.suptitle("half-life of states: 10th to 90th percentile, dot: median")
    for axes, (unit, parts) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        _draw_spreads(axes, layers, parts)
        axes.set_ylabel(f"half-life in {unit}" + (" to the partition" if unit == "writes" else ""))
    save_picture(figure, path)


def _draw_spreads(axes: Axes, layers: Sequence[Layer], parts: Mapping[str, Mapping[int, Spread]]) -> None:
    """Draw the bars of one unit, side by side for each layer; infinite ones at the top."""
    finite = [value for spreads in parts.values() for x in spreads.values() for value in _ends(x) if value < math.inf]
    # Infinite half-lives are drawn at `top`, above all finite ones.
    top = 4 * max(finite, default=1.0)
    for number, (name, spreads) in enumerate(parts.items()):
        if not spreads:
            continue
        place = [layer + 0.22 * (number - (len(parts) - 1) / 2) for layer in spreads]
        low, middle, high = ([min(value, top) for value in x] for x in zip(*map(_ends, spreads.values()), strict=True))
        colour = COLOURS[_BANKS.index(name)]
        axes.vlines(place, low, high, color=colour, linewidth=4, alpha=0.4)
        axes.plot(place, middle, "o", color=colour, label=name)
    axes.set_yscale("log")
    several_decades = max(finite, default=1.0) > 1000 * min(finite, default=1.0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if several_decades else (1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if any(value == math.inf for spreads in parts.values() for x in spreads.values() for value in _ends(x)):
        axes.axhline(top, color="#555555", linestyle="--", linewidth=1)
        axes.set_ylim(top=1.3 * top)
        axes.text(1.005, top, "inf", transform=axes.get_yaxis_transform(), va="center")
    if not finite:
        axes.set_yticks([])
        axes.set_yticks([], minor=True)
    axes.set_xticks([layer.layer for layer in layers], [f"{layer.layer}\n{layer.kind}" for layer in layers])
    axes.set_xlim(0.5, len(layers) + 0.5)
    axes.set_xlabel("layer")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _ends(spread: Spread) -> tuple[float, float, float]:
    return spread.p10, spread.p50, spread.p90


def _figure(layers: Sequence[Layer], num_plots: int, num_columns: int) -> Figure:
    width = min(10.0, max(5.0, 2.5 + 0.5 * num_columns))
    return Figure(figsize=(width * num_plots, max(3.0, 1.4 + 0.3 * len(layers))), layout="constrained")


def _label_rows(axes: Axes, layers: Sequence[Layer]) -> None:
    axes.set_yticks(range(len(layers)), [_name(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.grid(False)


def _name(layer: Layer) -> str:
    return f"{layer.layer} {layer.kind}"


def _write_numbers(axes: Axes, value_lN: np.ndarray, dark_lN: np.ndarray, digits: int = 2) -> None:
    """Write the cells' values, in white where the cell is dark."""
    if value_lN.shape[1] > _MOST_NUMBERS + 1:
        return
    for (row, column), value in np.ndenumerate(value_lN):
        if not math.isnan(value):
            colour = "white" if dark_lN[row, column] else "black"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8)
