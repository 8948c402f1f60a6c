"""Plots of calibration and of importance weights, on Matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_positive_int, check_type
from stochdyn.diagnostics.calibration import SBCResult
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.diagnostics.uniformity import ecdf_band, rank_ecdf, rank_points
from stochdyn.errors import InvalidInputError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_coverage", "plot_khat", "plot_rank_ecdf"]


def plot_rank_ecdf(
    result: SBCResult, names: Sequence[str] | None = None, *, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Draw how the distribution function of ranks differs from the uniform one, with its simultaneous band.

    A curve that leaves the band shows miscalibration: above zero on the left and below on the right means
    posteriors too narrow, the reverse too wide, and one sign throughout bias.

    Args:
        result: What :func:`stochdyn.diagnostics.sbc` returned.
        names: The quantities to draw; all if None.
        level: The probability that the ranks of exact inference stay in the band.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        InvalidInputError: If there is no such quantity.

    Example:
        >>> from stochdyn.diagnostics import SBCResult
        >>> plot_rank_ecdf(SBCResult({"rate": np.arange(100)}, num_draws=99)).get_xlabel()
        'fractional rank of the truth'

    Reference:
        Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison", 2022.
    """
    chosen = _chosen(result, names)
    points = rank_points(result.num_draws + 1)
    band = ecdf_band(len(result.ranks[chosen[0]]), points, level)
    ax = as_axes(ax)
    x = np.concatenate([[0.0], points, [1.0]])

    def ends(y: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], y - points, [0.0]])

    ax.fill_between(
        x,
        ends(band.lower),
        ends(band.upper),
        color="0.6",
        alpha=0.35,
        linewidth=0,
        label=f"{100 * level:g} % band",
    )
    for name in chosen:
        ecdf = rank_ecdf(result.ranks[name], result.num_draws + 1, points)
        ax.plot(x, ends(ecdf), label=name)
    ax.axhline(0.0, color="k", linewidth=0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("fractional rank of the truth")
    ax.set_ylabel("ECDF difference")
    add_legend(ax)
    return ax


def plot_coverage(
    result: SBCResult, names: Sequence[str] | None = None, *, num_levels: int = 19, ax: Axes | None = None
) -> Axes:
    """Draw how often central intervals contain the truth, against how often they should.

    Args:
        result: What :func:`stochdyn.diagnostics.sbc` returned.
        names: The quantities to draw; all if None.
        num_levels: The number of interval probabilities, equally spaced inside (0, 1).
        ax: Where to draw; new axes if None.

    Returns:
        The axes. The band is two binomial standard errors at either side, at each level alone.

    Raises:
        InvalidInputError: If there is no such quantity.

    Example:
        >>> from stochdyn.diagnostics import SBCResult
        >>> plot_coverage(SBCResult({"rate": np.arange(100)}, num_draws=99)).get_ylabel()
        'observed coverage'
    """
    chosen = _chosen(result, names)
    check_positive_int(num_levels, "num_levels")
    tables = result.coverage([i / (num_levels + 1) for i in range(1, num_levels + 1)])
    ax = as_axes(ax)
    first = tables[chosen[0]]
    x = np.concatenate([[0.0], first.nominal, [1.0]])
    margin = 2 * np.concatenate([[0.0], first.stderr, [0.0]])
    ax.fill_between(
        x,
        np.maximum(x - margin, 0),
        np.minimum(x + margin, 1),
        color="0.6",
        alpha=0.35,
        linewidth=0,
        label="± 2 standard errors",
    )
    ax.plot([0, 1], [0, 1], color="k", linewidth=0.6)
    for name in chosen:
        ax.plot(tables[name].nominal, tables[name].observed, ".-", label=name)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage")
    add_legend(ax)
    return ax


def plot_khat(log_weights: Tensor | np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw importance weights on log axes beside the Pareto tail fitted to them, which k-hat describes.

    Args:
        log_weights: The logarithms of importance weights, ``(S,)``.
        ax: Where to draw; new axes if None.

    Returns:
        The axes: the weight over the mean weight against the fraction of draws above it.

    Raises:
        TooFewDrawsError, NonFiniteError: As :func:`stochdyn.diagnostics.pareto_smooth`.
        ShapeError: If there is more than one axis.

    Example:
        >>> plot_khat(torch.randn(1000)).get_ylabel()
        'weight / mean weight'
    """
    lw = as_tensor(log_weights, "log_weights", finite=False).detach().double().cpu()
    if lw.ndim != 1:
        raise ShapeError(
            "log_weights must have one axis", got=f"shape {tuple(lw.shape)}", expected="(draws,)"
        )
    smoothed, khat = pareto_smooth(lw)
    size = lw.shape[0]
    shift = lw.logsumexp(0) - math.log(size)
    above = (torch.arange(size, dtype=lw.dtype) + 0.5) / size
    raw = (lw.sort(descending=True).values - shift).exp().numpy()
    fitted = (smoothed.sort(descending=True).values - shift).exp().numpy()
    k = khat.item()
    verdict = "reliable" if k < 0.5 else "usable" if k < 0.7 else "unreliable"
    colour = {"reliable": "C2", "usable": "C1", "unreliable": "C3"}[verdict]
    ax = as_axes(ax)
    ax.loglog(above.numpy(), raw, "k.", markersize=3, label="weights")
    ax.loglog(above.numpy(), fitted, color=colour, label="Pareto smoothed")
    ax.set_title(f"k-hat = {k:.2f}: {verdict}")
    ax.set_xlabel("fraction of draws above")
    ax.set_ylabel("weight / mean weight")
    add_legend(ax)
    return ax


def _chosen(result: SBCResult, names: Sequence[str] | None) -> list[str]:
    check_type(result, SBCResult, "result", hint="it is what sbc returns")
    check_type(names, (list, tuple, type(None)), "names", hint="a list of names of quantities")
    chosen = list(result.ranks) if names is None else [str(name) for name in names]
    missing = [name for name in chosen if name not in result.ranks]
    if missing or not chosen:
        raise InvalidInputError(
            "no such quantity", got=", ".join(missing) or None, expected=", ".join(result.ranks)
        )
    return chosen
