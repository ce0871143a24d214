"""Report of the study of recall: a table and plots of all results in a folder; needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sse.reports.style import label_steps, save_picture
from megatron_sse.tools.recall_arms import ARMS, BASE, CLAIMS
from megatron_sse.tools.studies.results import Result, write_tables

BY_N = {
    "SSE": ("n1k1", "n2k1", "n4k1", "n8k1", "n16k1"),
    "router of its own for reads": ("n2k1_own_reads", "n4k1_own_reads", "own_reads", "n16k1_own_reads"),
}
LEVELS = ("gla", "gla_large_heads", "gla_value_heads", "softmax")


def best_match(layers: list[dict[str, Any]]) -> float:
    """Return the largest share, over layers and tokens after the key, of questions that read where their pair is.

    NaN where no layer has partitions.
    """
    return max((share for layer in layers for share in layer.get("match_behind", [])), default=math.nan)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, range, mean and standard deviation of these values, which are the population."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "mean": mean(values),
        "std": pstdev(values),
    }


def write_report(output: Path, found: dict[str, list[Result]], wanted: list[tuple[str, int]]) -> str:
    """Write report.md, results.json and plots, and return the report. wanted: arms and seeds asked for."""
    have = {(arm, result["seed"]) for arm, results in found.items() for result in results}
    missing = [run for run in wanted if run not in have]
    summary: dict[str, dict[str, Any]] = {}
    for arm, results in found.items():
        summary[arm] = {"seeds": [result["seed"] for result in results]}
        for name in ("accuracy", "loss", "seconds"):
            summary[arm][name] = spread([result[name] for result in results])
        matches = [best_match(result["points"][-1]["layers"]) for result in results]
        # NaN: the arm has no partitions.
        if not math.isnan(matches[0]):
            summary[arm]["match"] = spread(matches)
    text = _tabulate(found, summary, missing)
    write_tables(output, found, text)
    draw_accuracy(output / "accuracy.png", found)
    draw_partitions(output / "partitions.png", found)
    draw_match(output / "match.png", found)
    draw_training(output / "training.png", found)
    return text


def _tabulate(found: dict[str, list[Result]], summary: dict[str, Any], missing: list[tuple[str, int]]) -> str:
    runs = [result for results in found.values() for result in results]
    steps = sorted({result["settings"]["training"]["steps"] for result in runs})
    commits = sorted({result["commit"] for result in runs})
    samples = sorted({result["samples"] for result in runs})
    lines = [f"Steps: {_list(steps)}. Sequences measured: {_list(samples)}. Commits: {', '.join(commits)}.", ""]
    if missing:
        lines += [f"Missing: {'; '.join(f'{arm}, seed {seed}' for arm, seed in missing)}.", ""]
    lines += [
        "Accuracy over seeds; match: share of questions that read a partition that their pair was written to (of the "
        "layer and the token behind the key where it is largest), and that of questions paired with any value. State: "
        "elements for each sequence.",
        "",
        "| arm | claims | seeds | median | min | max | mean | std | match | by chance | parameters | state | s |",
        "|---" * 13 + "|",
    ]
    for arm, results in found.items():
        accuracy, match = summary[arm]["accuracy"], summary[arm].get("match")
        numbers = " | ".join(f"{accuracy[name]:.3f}" for name in ("median", "min", "max", "mean", "std"))
        matches = "- | -"
        if match:
            chance = median(result["points"][-1]["layers"][-1].get("match_chance", 0.0) for result in results)
            matches = f"{match['median']:.3f} | {chance:.3f}"
        sizes = f"{results[0]['parameters']:,} | {results[0]['state_elements']:,}"
        seconds = summary[arm]["seconds"]["median"]
        lines.append(
            f"| {arm} | {', '.join(ARMS[arm].claims)} | {len(results)} | {numbers} | {matches} | {sizes} "
            f"| {seconds:.0f} |"
        )
    lines += ["", *(f"- {key}: {claim}" for key, claim in CLAIMS.items()), "", *_bars(summary)]
    return "\n".join(lines).rstrip() + "\n"


def _list(numbers: list[int]) -> str:
    return " and ".join(f"{number:,}" for number in numbers)


def _bars(summary: dict[str, Any]) -> list[str]:
    """Return a line for each expectation of the medians, and whether it holds."""
    # The bars are functions, so that those of arms without results are reported as not measured.
    middle = {arm: values["accuracy"]["median"] for arm, values in summary.items()}
    bars = [("n8k1 at least 0.80", lambda: middle[BASE] >= 0.8)]
    bars += [("n8k1 at least 0.30 above no_weights", lambda: middle[BASE] - middle["no_weights"] >= 0.3)]
    bars += [("gla at most 0.50", lambda: middle["gla"] <= 0.5)]
    bars += [("softmax at least 0.99", lambda: middle["softmax"] >= 0.99)]
    lines = []
    for name, holds in bars:
        try:
            lines.append(f"- {name}: {'holds' if holds() else 'does not hold'}")
        except KeyError:
            lines.append(f"- {name}: not measured")
    return lines


def draw_accuracy(path: Path, found: dict[str, list[Result]]) -> None:
    """Draw the accuracy of every seed of every arm, and the medians."""
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, results in enumerate(found.values()):
        accuracies = [result["accuracy"] for result in results]
        axes.plot(accuracies, [row] * len(accuracies), "o", color="tab:blue", alpha=0.6)
        axes.plot(median(accuracies), row, "|", color="black", markersize=16)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    _finish(axes, "accuracy of every seed; bars: medians")
    _limit(axes.set_xlim)
    axes.set_xlabel("share of values recalled")
    save_picture(figure, path, dpi=120)


def draw_partitions(path: Path, found: dict[str, list[Result]]) -> None:
    """Draw accuracy by number of partitions, beside models without partitions."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, arms) in enumerate(BY_N.items()):
        rising = [found[arm] for arm in arms if arm in found]
        partitions = [results[0]["partitions"] for results in rising]
        for count, results in zip(partitions, rising, strict=True):
            axes.plot([count] * len(results), [result["accuracy"] for result in results], "o", c=f"C{number}")
        if rising:
            middle = [median(result["accuracy"] for result in results) for results in rising]
            axes.plot(partitions, middle, "-", c=f"C{number}", label=f"{name}, median")
    for number, arm in enumerate((arm for arm in LEVELS if arm in found), len(BY_N)):
        middle_of_arm = median(result["accuracy"] for result in found[arm])
        axes.axhline(middle_of_arm, color=f"C{number}", linestyle="--", label=f"{arm}, median")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("partitions")
    axes.set_ylabel("share of values recalled")
    _finish(axes, "accuracy by number of partitions, equal parameters")
    _limit(axes.set_ylim)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save_picture(figure, path, dpi=120)


def draw_match(path: Path, found: dict[str, list[Result]]) -> None:
    """Draw accuracy against match, at the end of every run and on the way; colours by the first claim of an arm."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    # With one partition every question matches.
    routed = {arm: results for arm, results in found.items() if results[0]["partitions"] > 1}
    for number, claim in enumerate(CLAIMS):
        runs = [result for arm, results in routed.items() if ARMS[arm].claims[0] == claim for result in results]
        ways = [[(best_match(point["layers"]), point["accuracy"]) for point in run["points"]] for run in runs]
        for way in ways:
            axes.plot(*zip(*way, strict=True), "-", color=f"C{number}", alpha=0.2, linewidth=1)
        if ways:
            ends = [way[-1] for way in ways]
            axes.plot(*zip(*ends, strict=True), "os^D"[number % 4], color=f"C{number}", label=f"claim {claim}")
    axes.set_xlabel("share of questions that read where their pair was written, best layer")
    axes.set_ylabel("share of values recalled")
    _finish(axes, "accuracy against match; lines: while training")
    _limit(axes.set_xlim)
    _limit(axes.set_ylim)
    if routed:
        axes.legend(loc="upper left")
    save_picture(figure, path, dpi=120)


def draw_training(path: Path, found: dict[str, list[Result]]) -> None:
    """Draw largest share of a partition, rank of the states and match over training, with and without balance loss."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    columns = figure.subplots(1, 3)
    for number, arm in enumerate(arm for arm in (BASE, "no_balance") if arm in found):
        for result in found[arm]:
            steps = [point["step"] for point in result["points"]]
            lasts = [point["layers"][-1] for point in result["points"]]
            curves = (
                [max(layer["share_N"]) for layer in lasts],
                [mean(layer["rank_B"][1:]) for layer in lasts],
                [best_match(point["layers"]) for point in result["points"]],
            )
            for axes, curve in zip(columns, curves, strict=True):
                label = arm if result is found[arm][0] else None
                axes.plot(steps, curve, ".-", color=f"C{number}", alpha=0.7, label=label)
    titles = (
        "largest share of tokens of a partition, last layer",
        "effective rank of partitions, mean, last layer",
        "match, best layer",
    )
    for axes, title in zip(columns, titles, strict=True):
        label_steps(axes)
        _finish(axes, title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save_picture(figure, path, dpi=120)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _limit(set_limits: Any) -> None:
    set_limits(-0.03, 1.03)
