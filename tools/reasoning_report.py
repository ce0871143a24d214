"""Report of the study of reasoning: a table and a picture of all results in a folder; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sse.reports.style import COLOURS, STYLE, label_steps, save_picture
from megatron_sse.tools.studies.results import Result, mean_cpu_seconds, write_tables

PICTURE = "reasoning.png"


def write_report(output: Path, found: dict[str, list[Result]], wanted: list[tuple[str, int]]) -> str:
    """Write report.md, results.json and the picture, and return the report.

    found: results of each arm, that of imitation first. wanted: arms and seeds asked for.
    """
    have = {(arm, result["seed"]) for arm, results in found.items() for result in results}
    text = _tabulate(found, [run for run in wanted if run not in have])
    write_tables(output, found, text)
    with rc_context(STYLE):
        save_picture(_draw(found), output / PICTURE)
    return text


def spread_by_step(results: list[Result], name: str) -> dict[int, tuple[float, float, float]]:
    """Return mean, least and greatest value of a curve over the seeds, by the steps that all of them have."""
    curves = [{point["step"]: point[name] for point in result["points"] if name in point} for result in results]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = {step: [curve[step] for curve in curves] for step in steps}
    return {step: (mean(each), min(each), max(each)) for step, each in values.items()}


def _tabulate(found: dict[str, list[Result]], missing: list[tuple[str, int]]) -> str:
    runs = [result for results in found.values() for result in results]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    versions = sorted({", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs})
    lines = [f"Commits: {commits}. Versions: {'; '.join(versions)}.", ""]
    if missing:
        lines += [f"Missing: {'; '.join(f'{arm}, seed {seed}' for arm, seed in missing)}.", ""]
    steps = sorted({step for results in found.values() for step in spread_by_step(results[1:], "accuracy")})
    between = "; ".join(sorted({"{} to {}".format(*run["between"]) for run in runs}))
    lines += [
        "Share of the held-out problems that the likeliest tokens solve. SFT: at the first measured checkpoint with a "
        f"share of {between}, else the last one; of one seed. Then by step of reinforcement learning: mean "
        "(least, greatest) over the seeds. State: numbers that are kept of a sequence. CPU: seconds of one run.",
        "",
        f"| arm | parameters | state | SFT steps | SFT | seeds | {' | '.join(map(str, steps))} | CPU SFT | CPU RL |",
        "|---" * (8 + len(steps)) + "|",
    ]
    for arm, (first, *others) in found.items():
        point, shares = first["points"][-1], spread_by_step(others, "accuracy")
        cells = [_cell(*shares[step]) if step in shares else "-" for step in steps]
        costs = (mean_cpu_seconds(runs) for runs in ([first], others))
        cost = " | ".join("-" if seconds is None else f"{seconds:.0f}" for seconds in costs)
        lines.append(
            f"| {arm} | {first['parameters']:,} | {first['state_elements']:,} | {point['step']} "
            f"| {point['accuracy']:.3f} | {len(others)} | {' | '.join(cells)} "
            f"| {cost} |"
        )
    return "\n".join([*lines, "", f"![shares and rewards by step]({PICTURE})"]) + "\n"


def _cell(middle: float, least: float, greatest: float) -> str:
    return f"{middle:.3f}" if least == greatest else f"{middle:.3f} ({least:.3f}, {greatest:.3f})"


def _draw(found: dict[str, list[Result]]) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    imitation, held_out, rewards = figure.subplots(1, 3)
    for (arm, (first, *others)), colour in zip(found.items(), COLOURS, strict=False):
        points = first["points"]
        steps, shares = [point["step"] for point in points], [point["accuracy"] for point in points]
        imitation.plot(steps, shares, ".-", color=colour, label=arm)
        if others:
            _draw_spread(held_out, others, "accuracy", colour, ".-")
            _draw_spread(rewards, others, "reward", colour, "-")
    imitation.legend(loc="upper left")
    titles = ("SFT: held-out share solved", "RL: held-out share solved", "RL: mean reward of the step's answers")
    for axes, title in zip((imitation, held_out, rewards), titles, strict=True):
        label_steps(axes)
        axes.set_title(title)
        axes.set_ylim(0, 1)
    return figure


def _draw_spread(axes: Axes, results: list[Result], name: str, colour: str, style: str) -> None:
    """Draw the mean over seeds, and a band from the least to the greatest value."""
    shares = spread_by_step(results, name)
    middle, least, greatest = zip(*shares.values(), strict=True)
    axes.plot([*shares], middle, style, color=colour)
    axes.fill_between([*shares], least, greatest, color=colour, alpha=0.2, linewidth=0)
