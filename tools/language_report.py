"""Report of the study of language modelling: tables and plots of all results in a folder; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sse.reports.style import save_picture
from megatron_sse.tools.language_arms import ARMS
from megatron_sse.tools.language_measure import KINDS, RARE, RECALL
from megatron_sse.tools.studies.rates import choose_rates
from megatron_sse.tools.studies.results import Result, mean_cpu_seconds, write_tables

Found = dict[str, list[Result]]


def write_report(output: Path, found: Found) -> str:
    """Write report.md, results.json and plots, and return the report."""
    best = choose_rates(found, output)
    text = "\n".join([*_head(found), *_arms(found, best), *_kinds(best), *_positions(best), *_lengths(best)]) + "\n"
    write_tables(output, found, text)
    draw_kinds(output / "kinds.png", best)
    draw_positions(output / "positions.png", best)
    draw_lengths(output / "lengths.png", best)
    return text


def _head(found: Found) -> list[str]:
    runs = [result for results in found.values() for result in results]
    commits = sorted({result["commit"] for result in runs})
    tokens = sorted({f"{result['tokens']:,}" for result in runs})
    lengths = sorted({result["settings"]["data"]["sequence_length"] for result in runs})
    return [
        f"{len(runs)} runs of {', '.join(tokens)} tokens in sequences of {', '.join(map(str, lengths))}. "
        f"Commits: {', '.join(commits)}.",
        "",
        "All numbers but the validation losses are of the test text. Where an arm has several seeds, they are means; "
        "brackets have the least and the most.",
        "",
    ]


def _spread(values: list[float | None]) -> str:
    """Return the mean of values over seeds, with their range; a dash where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{mean(known):.3f}"
    return text if len(known) == 1 else f"{text} ({min(known):.3f} to {max(known):.3f})"


def _arms(found: Found, best: Found) -> list[str]:
    rates = sorted({result["learning_rate"] for results in found.values() for result in results})
    columns = ["arm", "parameters", "state elements", *(f"validation loss, {rate:g}" for rate in rates)]
    columns += ["learning rate", "seeds", "bits per byte", "loss", "processor ms per 1,000 tokens"]
    lines = _table_head(columns)
    for arm, results in best.items():
        first = {result["learning_rate"]: result for result in found[arm] if result["seed"] == 0}
        cells = [ARMS[arm].label, f"{results[0]['parameters']:,}", f"{results[0]['state_elements']:,}"]
        cells += [f"{first[rate]['validation']:.3f}" if rate in first else "-" for rate in rates]
        cells += [f"{results[0]['learning_rate']:g}", str(len(results))]
        for name in ("bits_per_byte", "loss"):
            cells.append(_spread([result["lengths"][0][name] for result in results]))
        seconds = mean_cpu_seconds(results)
        cells.append("-" if seconds is None else f"{seconds / results[0]['tokens'] * 1e6:.0f}")
        lines.append(_row(cells))
    return [*lines, ""]


def _kinds(best: Found) -> list[str]:
    some = next(iter(best.values()))[0]["kinds"]
    total = sum(some[kind]["tokens"] for kind in KINDS)
    shares = {kind: some[kind]["tokens"] / total for kind in KINDS}
    lines = [
        f"Loss in nats by kind of token. A pair is a token with the one before it. Recall: the pair occurs at most "
        f"{RARE} times in the training text, and earlier in its piece ({shares[RECALL]:.1%} of the tokens). New: as "
        f"rare, and not earlier ({shares['new']:.1%}). Other: all others. The last columns are recall tokens by the "
        "distance to the pair's last place.",
        "",
    ]
    # Neighbouring powers of two have few tokens at both ends.
    ranges = [(1, 32), (32, 128), (128, 512), (512, 1 << 62)]
    names = ["below 32", "32 to 127", "128 to 511", "512 and more"]
    lines += _table_head(["arm", *KINDS, *names])
    for arm, results in best.items():
        cells = [ARMS[arm].label]
        cells += [_spread([result["kinds"][kind]["loss"] for result in results]) for kind in KINDS]
        for low, high in ranges:
            cells.append(_spread([_distance_loss(result, low, high) for result in results]))
        lines.append(_row(cells))
    return [*lines, ""]


def _distance_loss(result: Result, low: int, high: int) -> float | None:
    """Return the mean loss of recall tokens whose pair was last at least `low` and less than `high` tokens before.

    None where there are none.
    """
    parts = [part for part in result["kinds"]["by_distance"] if low <= part["first"] < high]
    tokens = sum(part["tokens"] for part in parts)
    return sum(part["tokens"] * part["loss"] for part in parts) / tokens if tokens else None


def _positions(best: Found) -> list[str]:
    lines = ["Loss by the number of tokens before the label in its piece (from that to less than twice as many).", ""]
    lines += _table_head(["arm", *(f"{first:,}" for first in _by_position(next(iter(best.values()))[0]))])
    for arm, results in best.items():
        curves = [_by_position(result) for result in results]
        lines.append(_row([ARMS[arm].label, *(f"{mean(curve[first] for curve in curves):.3f}" for first in curves[0])]))
    return [*lines, ""]


def _by_position(result: Result) -> dict[int, float]:
    """Return the loss by position at the trained length: from 16 tokens on, where there are enough, to its end."""
    measured = result["lengths"][0]
    return {b["first"]: b["loss"] for b in measured["buckets"] if 16 <= b["first"] < measured["length"]}


def _lengths(best: Found) -> list[str]:
    lengths = [entry["length"] for entry in next(iter(best.values()))[0]["lengths"]]
    lines = ["Loss by the length of the pieces; the first is that of training.", ""]
    lines += _table_head(["arm", *(f"{length:,}" for length in lengths)])
    for arm, results in best.items():
        by_length = ([result["lengths"][number]["loss"] for result in results] for number in range(len(lengths)))
        lines.append(_row([ARMS[arm].label, *map(_spread, by_length)]))
    return lines


def _table_head(columns: list[str]) -> list[str]:
    return [_row(columns), "|" + "---|" * len(columns)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_kinds(path: Path, best: Found) -> None:
    """Draw how far each arm is above the softmax arm, on recall tokens and on the others; every seed is a point."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in best if arm != "softmax"]
    for number, kind in enumerate(KINDS if "softmax" in best else ()):
        if not best["softmax"][0]["kinds"][kind]["tokens"]:
            continue
        base = mean(result["kinds"][kind]["loss"] for result in best["softmax"])
        for row, arm in enumerate(arms):
            gaps = [result["kinds"][kind]["loss"] - base for result in best[arm]]
            label = f"{kind} tokens" if row == 0 else None
            axes.plot(gaps, [row + 0.2 * (number - 1)] * len(gaps), "o", c=f"C{number}", alpha=0.7, label=label)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(arms)), [ARMS[arm].label for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("loss above softmax, nats per token")
    _finish(axes, "where the arms differ from softmax; every seed is a point")
    save_picture(figure, path)


def draw_positions(path: Path, best: Found) -> None:
    """Draw the loss by position, from 16 tokens on."""
    _draw_curves(path, best, _by_position, "tokens before the label", "loss by position")


def draw_lengths(path: Path, best: Found) -> None:
    """Draw the loss by the length of the pieces."""

    def curve(result: Result) -> dict[int, float]:
        return {entry["length"]: entry["loss"] for entry in result["lengths"]}

    _draw_curves(path, best, curve, "tokens of a piece", "loss by length; the shortest is that of training")


def _draw_curves(path: Path, best: Found, curve: Callable[[Result], dict[int, float]], label: str, title: str) -> None:
    """Draw a curve for each arm, the mean over its seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (arm, results) in enumerate(best.items()):
        curves = [curve(result) for result in results]
        places = list(curves[0])
        middle = [mean(other[place] for other in curves) for place in places]
        axes.plot(places, middle, "o-", c=f"C{number}", label=ARMS[arm].label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xlabel(label)
    axes.set_ylabel("loss, nats per token")
    _finish(axes, title)
    save_picture(figure, path)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        # Beside the plot, where it hides no curve.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
