"""What all figures share: new axes, and a legend that covers no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stochdyn.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["add_legend", "as_axes"]


def as_axes(ax: Axes | None, figsize: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """Return ``ax``, or new axes of the given size in inches if None."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("Matplotlib is not installed", hint="pip install matplotlib") from error
    return pyplot.subplots(figsize=figsize, layout="constrained")[1]


def add_legend(ax: Axes) -> None:
    """Write the legend beside the axes, where a title that is set later has its place above them.

    A figure without a layout engine leaves no room outside the axes; Matplotlib then looks for the emptiest corner.
    """
    if not ax.get_legend_handles_labels()[0]:
        return
    if ax.figure.get_layout_engine() is None:
        ax.legend(fontsize="small")
    else:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
