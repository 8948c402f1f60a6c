"""Plots of what only fractional noise has: Hurst indices that vary in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import check_time_grid
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.errors import ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_hurst_curve"]


def plot_hurst_curve(
    ts: Tensor,
    hurst: Callable[[Tensor], Tensor] | Tensor,
    *,
    truth: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.9,
    label: str = "posterior",
    colour: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw a Hurst index against time: one curve, or the median and central interval of many.

    Args:
        ts: The times ``(T,)``.
        hurst: A function such as :class:`~stochdyn.fractional.HurstCurve`, or its values ``(T,)`` or draws ``(T, S)``.
        truth: Another function, drawn dashed.
        level: The probability of the interval.
        label: The name of the curve in the legend.
        colour: The colour of the curve.
        ax: The axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ShapeError: If there isn't one index per time.
        MissingDependencyError: Without matplotlib.

    Example:
        >>> from stochdyn.fractional import HurstCurve
        >>> ax = plot_hurst_curve(torch.linspace(0, 1, 5), HurstCurve(3, horizon=1.0))
        >>> [float(end) for end in ax.get_ylim()]
        [0.0, 1.0]
    """
    check_time_grid(ts)
    with torch.no_grad():
        values = hurst if isinstance(hurst, Tensor) else hurst(ts)
        exact = None if truth is None else truth(ts)
    if values.ndim not in (1, 2) or values.shape[0] != ts.shape[0]:
        raise ShapeError(
            "a curve needs one index per time",
            got=tuple(values.shape),
            expected=f"({ts.shape[0]},) or (T, S)",
        )
    axes = as_axes(ax)
    times = ts.detach().cpu().numpy()
    if values.ndim == 2:
        tail = 0.5 * (1 - level)
        low, middle, high = (torch.quantile(values, q, dim=1).cpu().numpy() for q in (tail, 0.5, 1 - tail))
        axes.fill_between(times, low, high, color=colour, alpha=0.3, linewidth=0, label=f"{level:.0%}")
        axes.plot(times, middle, color=colour, label=label)
    else:
        axes.plot(times, values.detach().cpu().numpy(), color=colour, label=label)
    if exact is not None:
        axes.plot(times, exact.cpu().numpy(), color="black", linestyle="--", label="truth")
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("t")
    axes.set_ylabel("H(t)")
    add_legend(axes)
    return axes
