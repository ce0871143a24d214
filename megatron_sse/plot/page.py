"""One HTML page with pictures, results and the settings that differ. It needs no other file."""

from __future__ import annotations

import base64
import math
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_sse.durable import output_file
from megatron_sse.plot.figures import Picture
from megatron_sse.plot.layouts import find_layout
from megatron_sse.plot.read import RunLog
from megatron_sse.reports.style import COLOURS

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1320px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .6em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3em 1.4em .3em 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th { font-weight: 600; } td { max-width: 26em; overflow-wrap: anywhere; }
.mark { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6em 2em; }
@media (max-width: 900px) { .pictures { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9em; }
"""


def write_page(runs: list[RunLog], pictures: list[Picture], folder: Path) -> Path:
    """Write index.html into `folder` and return its path."""
    title = "megatron-sse: " + ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", "<h2>Runs</h2>", _table(*_results(runs))]
    body += ["<h2>Pictures</h2>", '<div class="pictures">', *map(_figure, pictures), "</div>"]
    if len(runs) > 1:
        body += ["<h2>Settings that differ</h2>", _table(*_differences(runs))]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    path = folder / "index.html"
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}<style>{STYLE}</style></head><body>', *body]
    with output_file(path) as file:
        file.write("\n".join([*lines, "</body></html>", ""]).encode())
    return path


def _results(runs: list[RunLog]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "layout", "processes", "steps", "loss", "validation loss", "bits per byte", "tokens/s", "spikes"]
    rows = []
    for number, run in enumerate(runs):
        layout, steps = find_layout(run), max(step for curve in run.scalars.values() for step, _ in curve)
        mark = f'<span class="mark" style="background: {COLOURS[number % len(COLOURS)]}"></span>'
        speeds = [value for _, value in run.curve("speed/tokens_per_second")]
        rows.append(
            [
                mark + escape(run.name),
                escape(str(layout)),
                str(layout.num_processes),
                f"{steps:,} of {run.settings['training.steps']:,}",
                _number(run.last("train/loss"), ".4f"),
                _number(run.last("validation/loss"), ".4f"),
                _number(run.last("validation/bits_per_byte"), ".3f"),
                _number(median(speeds) if speeds else None, ",.0f"),
                _number(run.last("train/spikes"), ".0f"),
            ]
        )
    # Drop columns that are empty for all runs.
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return [header[column] for column in filled], [[row[column] for column in filled] for row in rows]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _differences(runs: list[RunLog]) -> tuple[list[str], list[list[str]]]:
    """Return a row for each setting that differs between runs (except the folder), with a column for each run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [_show(run.settings[key]) if key in run.settings else "" for run in runs]
        # Runs of an earlier version lack keys that are null since.
        if len(set(values)) > 1 and key != "monitor.folder" and not set(values) <= {"", _show(None)}:
            rows.append([escape(text) for text in (key, *values)])
    return ["setting", *(escape(run.name) for run in runs)], rows or [["none", *[""] * len(runs)]]


def _show(value: Any) -> str:
    """Return a value as YAML in one line, sources of data without their null entries."""
    if isinstance(value, list):
        value = [{k: v for k, v in x.items() if v is not None} if isinstance(x, dict) else x for x in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    image = f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    wide = ' class="wide"' if picture.wide else ""
    return f"<figure{wide}>{image}<figcaption>{escape(picture.note)}</figcaption></figure>"
