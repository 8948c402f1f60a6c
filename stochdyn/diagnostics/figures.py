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
    """Write the legend above the axes, or beside them if they have a title.

    A figure without a layout engine leaves no room outside the axes; Matplotlib then looks for the emptiest corner.
    """
    entries = len(ax.get_legend_handles_labels()[0])
    if not entries:
        return
    if ax.figure.get_layout_engine() is None:
        ax.legend(fontsize="small")
    elif ax.get_title() or entries > 8:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    else:
        columns = entries if entries < 4 else 3 if entries in (5, 6) else 4
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, fontsize="small")
