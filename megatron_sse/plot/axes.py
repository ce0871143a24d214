"""What the axes of all plots have in common."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def label_steps(axes: Axes) -> None:
    """Whole steps, round numbers of them, from left to right."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
