"""Settings that the axes of all plots share."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def label_steps(axes: Axes) -> None:
    """Label the horizontal axis with steps, at round numbers."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
