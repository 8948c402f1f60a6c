"""Plots of paths, training curves and posterior densities, on Matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    as_time_grid,
    check_choice,
    check_finite,
    check_inside,
    check_nonempty,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.errors import InvalidInputError, ShapeError, TooFewDrawsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HasLosses", "plot_density", "plot_paths", "plot_training"]


@runtime_checkable
class HasLosses(Protocol):
    """What :func:`stochdyn.fit` returns, as far as its curve goes."""

    losses: Tensor
    bound: str


# Whatever becomes a tensor: lists, NumPy, pandas, xarray, torch.
Values = Any

_MEANING = {
    "evidence_lower": "negative ELBO (nats)",
    "kl_upper": "upper bound on the divergence (nats)",
    "residual": "residual",
    "surrogate": "loss",
}


def plot_paths(
    ts: Values,
    draws: Values | Path | PathMeasure,
    *,
    component: int = 0,
    observations: tuple[Values, Values] | None = None,
    forecast_from: float | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    num_lines: int = 0,
    num_samples: int = 1000,
    generator: torch.Generator | int | None = 0,
    label: str = "posterior",
    colour: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw a law on paths as a fan: nested central intervals, the median, the data on top.

    Args:
        ts: The increasing times ``(T,)``.
        draws: Any law on paths, of which ``num_samples`` paths are drawn; or paths that were drawn, as a law's
            ``sample`` returns them; or an array ``(S, T)`` or ``(S, T, d)``.
        component: Which component of the state is drawn.
        observations: The times and values of the data, ``(n,)`` each; NaN values are left out.
        forecast_from: The time from which the background is shaded as forecast.
        levels: The probabilities of the intervals, in (0, 1).
        num_lines: The number of draws that are shown as lines besides.
        num_samples: The number of paths drawn from a law.
        generator: The source of randomness of the paths of a law.
        label: The name of the law in the legend.
        colour: Matplotlib colour.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        TimeGridError: If the times don't increase, or the forecast starts outside them.
        ShapeError: If draws or observations don't fit their times.
        TooFewDrawsError: If there are fewer than two draws.
        NonFiniteError: If a draw isn't finite.
        InvalidInputError: If a level isn't inside (0, 1), or there is no such component.

    Example:
        >>> ax = plot_paths(torch.linspace(0, 1, 5), torch.randn(100, 5), levels=(0.9,))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['posterior: 90 %', 'posterior: median']
        >>> import stochdyn as sd
        >>> law = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(lambda t, x: -x, 1.0))
        >>> ax = plot_paths(torch.linspace(0, 1, 5), law, label="prior")
    """
    given = as_time_grid(ts)
    grid = given.detach().double().cpu()
    check_positive_int(num_lines, "num_lines", minimum=0)
    check_positive_int(component, "component", minimum=0)
    _check_levels(levels)
    if isinstance(draws, PathMeasure):
        check_positive_int(num_samples, "num_samples", minimum=2)
        with torch.no_grad():
            draws = draws.sample(given, num_samples, generator)
    paths = _component(draws.x if isinstance(draws, Path) else draws, component)
    if paths.ndim != 2 or paths.shape[1] != grid.shape[0]:
        raise ShapeError(
            "draws don't fit ts", got=f"shape {tuple(paths.shape)}", expected=f"(draws, {grid.shape[0]})"
        )
    if paths.shape[0] < 2:
        raise TooFewDrawsError("too few draws for a fan", got=paths.shape[0], expected="at least 2")
    check_finite(paths, "draws")
    data = None if observations is None else _observations(observations)
    if forecast_from is not None:
        check_real(forecast_from, "forecast_from")
        check_inside(grid.new_tensor([float(forecast_from)]), grid, "forecast_from")
    ax = as_axes(ax)
    t = grid.numpy()
    for level in sorted(levels, reverse=True):
        low, high = torch.quantile(paths, paths.new_tensor([(1 - level) / 2, (1 + level) / 2]), dim=0).numpy()
        name = f"{label}: {100 * level:g} %"
        ax.fill_between(t, low, high, color=colour, alpha=0.15 + 0.25 * (1 - level), linewidth=0, label=name)
    median = torch.quantile(paths, 0.5, dim=0).numpy()
    ax.plot(t, median, color=colour, label=f"{label}: median")
    for path in paths[:num_lines].numpy():
        ax.plot(t, path, color=colour, alpha=0.4, linewidth=0.6)
    if data is not None:
        when, what = data
        seen = ~what.isnan()
        ax.plot(when[seen].numpy(), what[seen].numpy(), "k.", markersize=4, label="data", zorder=3)
    ax.set_xlim(t[0], t[-1])
    if forecast_from is not None:
        ax.axvspan(forecast_from, t[-1], color="0.5", alpha=0.12, linewidth=0, label="forecast")
    ax.set_xlabel("time")
    ax.set_ylabel("value")
    add_legend(ax)
    return ax


def plot_training(
    losses: Any, *, bound: str | None = None, window: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a training curve, the raw losses and their running mean.

    Args:
        losses: The losses by step, ``(steps,)``, or what :func:`stochdyn.fit` returns.
        bound: What the loss means, as in :class:`stochdyn.ObjectiveValue`; by default that of the result.
        window: The number of steps of the running mean, which lies at its window's end; a fiftieth of all by default.
        ax: Where to draw; new axes if None.

    Returns:
        The axes. They show all smoothed losses and the last 90 % of the raw ones.

    Raises:
        EmptyDataError: If there are no losses.
        ShapeError: If they have more than one axis.
        InvalidInputError: If the bound is unknown.

    Example:
        >>> plot_training(torch.rand(100), bound="evidence_lower").get_ylabel()
        'negative ELBO (nats)'
    """
    if isinstance(losses, HasLosses):
        bound = losses.bound if bound is None else bound
        losses = losses.losses
    bound = "surrogate" if bound is None else bound
    check_choice(bound, tuple(_MEANING), "bound")
    values = _tensor(losses, "losses")
    check_nonempty(values, "losses")
    if values.ndim != 1:
        raise ShapeError("losses have the wrong number of axes", got=tuple(values.shape), expected="(steps,)")
    window = max(1, values.shape[0] // 50) if window is None else window
    check_positive_int(window, "window")
    window = min(window, values.shape[0])
    smooth = values.unfold(0, window, 1).mean(-1)
    ax = as_axes(ax)
    steps = np.arange(1, values.shape[0] + 1)
    ax.plot(steps, values.numpy(), color="C0", alpha=0.3, linewidth=0.6, label="each step")
    ax.plot(steps[window - 1 :], smooth.numpy(), color="C0", label=f"mean of {window} steps")
    late = torch.cat([values[values.shape[0] // 10 :], smooth])
    late = late[late.isfinite()]
    if late.numel() and late.max() > late.min():
        margin = 0.05 * (late.max() - late.min()).item()
        ax.set_ylim(late.min().item() - margin, late.max().item() + margin)
    ax.set_xlabel("step")
    ax.set_ylabel(_MEANING[bound])
    add_legend(ax)
    return ax


def plot_density(
    draws: Values,
    *,
    references: Mapping[str, float] | None = None,
    level: float = 0.9,
    label: str = "posterior",
    xlabel: str = "value",
    colour: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw the density of a scalar posterior, its central interval, and reference values as vertical lines.

    Args:
        draws: The draws ``(S,)``; further axes, such as chains, are joined.
        references: Values to mark, by name in the legend.
        level: The probability of the shaded interval.
        label: The name in the legend.
        xlabel: The name of the quantity.
        colour: Matplotlib colour.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        TooFewDrawsError: If there are fewer than ten draws.
        NonFiniteError: If a draw isn't finite.
        InvalidInputError: If the level isn't inside (0, 1), or all draws are equal.

    Example:
        >>> ax = plot_density(torch.randn(500), references={"truth": 0.0}, xlabel="rate")
        >>> ax.get_xlabel(), ax.get_legend().get_texts()[-1].get_text()
        ('rate', 'truth')
    """
    from scipy import stats

    values = _tensor(draws, "draws").flatten()
    check_type(references, (Mapping, type(None)), "references")
    for name, value in (references or {}).items():
        check_real(value, f"references[{name!r}]")
    _check_levels((level,))
    if values.shape[0] < 10:
        raise TooFewDrawsError("too few draws for a density", got=values.shape[0], expected="at least 10")
    check_finite(values, "draws")
    if values.min() == values.max():
        raise InvalidInputError("all draws are equal, so there is no density", got=values[0].item())
    sample = values.numpy()
    estimate = stats.gaussian_kde(sample)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    pad = 3 * math.sqrt(estimate.covariance.item())
    x = np.linspace(sample.min() - pad, sample.max() + pad, 400)
    ax = as_axes(ax)
    ax.plot(x, estimate(x), color=colour, label=label)
    inner = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    ax.fill_between(inner, estimate(inner), color=colour, alpha=0.2, linewidth=0, label=f"{100 * level:g} %")
    for i, (name, value) in enumerate((references or {}).items()):
        ax.axvline(float(value), color="k", linestyle=("--", ":", "-.", "-")[i % 4], label=name)
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("density")
    add_legend(ax)
    return ax


def _tensor(values: object, name: str) -> Tensor:
    return as_tensor(values, name, finite=False).detach().double().cpu()


def _component(draws: object, component: int) -> Tensor:
    """Return one component ``(S, T)`` of draws ``(S, T)`` or ``(S, T, d)``."""
    paths = _tensor(draws, "draws")
    if paths.ndim < 3:
        return paths
    if component >= paths.shape[-1]:
        raise InvalidInputError(
            "there is no such component", got=component, expected=f"below {paths.shape[-1]}"
        )
    return paths[..., component]


def _observations(observations: object) -> tuple[Tensor, Tensor]:
    if not isinstance(observations, Sequence) or len(observations) != 2:
        raise InvalidInputError(
            "observations must be a pair of times and values", got=type(observations).__name__
        )
    when, what = _tensor(observations[0], "times of observations"), _tensor(observations[1], "observations")
    if when.ndim != 1 or when.shape != what.shape:
        got = f"{tuple(when.shape)} and {tuple(what.shape)}"
        raise ShapeError("observations don't fit", got=got, expected="(n,) both")
    return when, what


def _check_levels(levels: object) -> None:
    if not isinstance(levels, Sequence) or not levels:
        raise InvalidInputError("levels must be a list of probabilities", got=repr(levels)[:60])
    for level in levels:
        check_real(level, "levels", above=0.0, below=1.0)
