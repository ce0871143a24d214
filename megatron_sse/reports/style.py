"""The style of pictures: colours, fonts, and axes that several pictures have; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_sse.durable import output_file
from megatron_sse.errors import UserError

# The colours of Okabe and Ito, which colour-blind people can tell apart as well.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#8C6BB1"]
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 140,
}
# For shares of partitions times their number: 1 is the even share; all beyond twice that looks the same.
SHARE_NORM = TwoSlopeNorm(1.0, vmin=0.0, vmax=2.0)


def label_steps(axes: Axes) -> None:
    """Label the x axis with whole, round steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def save_picture(figure: Figure, path: Path, dpi: int | None = None) -> None:
    """Write a PNG file, which appears complete or not at all. Raises UserError."""
    try:
        with output_file(path) as file:
            figure.savefig(file, format="png", dpi=dpi or matplotlib.rcParams["savefig.dpi"])
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror})") from None
