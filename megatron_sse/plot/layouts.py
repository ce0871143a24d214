"""Drawings of a run's layout: which process holds which layers, and which part of which sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Patch, Rectangle

from megatron_sse.config.pattern import LAYER_KINDS, expand_pattern
from megatron_sse.plot.read import RunLog

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
KINDS = dict(zip((kind for kind in LAYER_KINDS if kind != "softmax"), _COLOURS, strict=False)) | {"softmax": "#E69F00"}
# With more boxes than this in a row, only the first copy of the model is drawn.
MOST_BOXES = 16
MOST_NUMBERS = 32


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes of parallelism, and the kinds of all layers."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    kinds: list[str]

    @property
    def num_processes(self) -> int:
        """Number of processes of the run."""
        return self.tensor * self.pipeline * self.context * self.data

    def stage_kinds(self, stage: int) -> list[str]:
        """Return the kinds of a pipeline stage's layers, chunk after chunk.

        With virtual pipelining, the chunks go round the stages: on 2 stages with 2 chunks each, stage 0 has the chunks
        0 and 2 of the model, stage 1 the chunks 1 and 3.
        """
        length = len(self.kinds) // (self.pipeline * self.virtual_pipeline)
        starts = [(chunk * self.pipeline + stage) * length for chunk in range(self.virtual_pipeline)]
        return [kind for start in starts for kind in self.kinds[start : start + length]]

    def rank(self, stage: int, copy: int, part: int, slice_: int) -> int:
        """Return the number of a process: neighbours share a tensor group, then a sequence, then a pipeline stage."""
        return ((stage * self.data + copy) * self.context + part) * self.tensor + slice_

    def __str__(self) -> str:
        axes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        parts = [f"{name} {size}" for name, size in axes.items() if size > 1]
        if self.virtual_pipeline > 1:
            parts.append(f"virtual pipeline {self.virtual_pipeline}")
        return ", ".join(parts) or "one process"


def find_layout(run: RunLog) -> Layout:
    """Return the layout that a run had at its end."""
    settings: dict[str, Any] = run.settings
    sizes = {name: int(settings[f"parallel.{name}"]) for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
    replica = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    num_processes = int(run.last("speed/processes") or replica * (settings["parallel.data"] or 1))
    period = expand_pattern(settings["model.layers"])
    kinds = period * (settings["model.num_layers"] // len(period))
    return Layout(**sizes, data=num_processes // replica, kinds=kinds)


def draw_layout(axes: Axes, run: RunLog) -> None:
    """Draw a row per stage: its layers, and a box per process in the colour of its part of the sequence."""
    layout = find_layout(run)
    axes.set_title(f"{run.name}\n{layout}")
    axes.axis("off")
    per_copy = layout.context * layout.tensor
    copies = layout.data if layout.data * per_copy <= MOST_BOXES else 1
    for stage in range(layout.pipeline):
        _draw_layers(axes, layout.stage_kinds(stage), stage)
        for copy in range(copies):
            for part in range(layout.context):
                for slice_ in range(layout.tensor):
                    place = (copy * layout.context + part) * layout.tensor + slice_ + 0.3 * copy
                    rank = layout.rank(stage, copy, part, slice_)
                    _draw_process(axes, rank, place, stage, part, layout.context, copies * per_copy <= MOST_NUMBERS)
    width = copies * per_copy + 0.3 * (copies - 1)
    for copy in range(copies):
        left = copy * (per_copy + 0.3)
        name = f"copy {copy + 1}" if copies == layout.data else f"copy 1 of {layout.data}"
        if layout.data > 1:
            axes.text(left + per_copy / 2, -0.15, name, ha="center", va="bottom")
    axes.set(xlim=(-LAYERS_WIDTH - 0.4, max(width, 4)), ylim=(layout.pipeline, -0.5))


LAYERS_WIDTH = 3.0


def _draw_layers(axes: Axes, kinds: list[str], stage: int) -> None:
    width = LAYERS_WIDTH / len(kinds)
    for number, kind in enumerate(kinds):
        left = -LAYERS_WIDTH - 0.2 + number * width
        axes.add_patch(Rectangle((left, stage + 0.15), width, 0.7, facecolor=KINDS[kind], edgecolor="white"))


def _draw_process(
    axes: Axes, rank: int, place: float, stage: int, part: int, num_parts: int, with_number: bool
) -> None:
    colour = part_colour(part, num_parts)
    axes.add_patch(Rectangle((place + 0.04, stage + 0.08), 0.92, 0.84, facecolor=colour, edgecolor="#555555"))
    if with_number:
        axes.text(place + 0.5, stage + 0.5, str(rank), ha="center", va="center")


def part_colour(part: int, num_parts: int) -> str:
    """Return white for full sequences, otherwise shades of purple from the first part to the last."""
    if num_parts == 1:
        return "#FFFFFF"
    return to_hex(matplotlib.colormaps["Purples"](0.25 + 0.4 * part / (num_parts - 1)))


def layout_legend(runs: list[RunLog]) -> list[Patch]:
    """Return legend entries for the kinds of layers and the parts of sequences in use."""
    layouts = [find_layout(run) for run in runs]
    used = {kind for layout in layouts for kind in layout.kinds}
    entries = [Patch(color=colour, label=f"{kind} layer") for kind, colour in KINDS.items() if kind in used]
    if any(layout.context == 1 for layout in layouts):
        entries.append(Patch(facecolor=part_colour(0, 1), edgecolor="#555555", label="full sequences"))
    if any(layout.context > 1 for layout in layouts):
        entries.append(Patch(facecolor=part_colour(0, 2), edgecolor="#555555", label="first part of sequences"))
        entries.append(Patch(facecolor=part_colour(1, 2), edgecolor="#555555", label="last part"))
    return entries
