"""Plots of paths, training, calibration, importance weights and posteriors, on Matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_finite, check_nonempty, check_positive_int, check_time_grid
from stochdyn.errors import InvalidInputError, MissingDependencyError, ShapeError, TooFewDrawsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stochdyn.diagnostics.calibration import SBCResult

__all__ = ["plot_coverage", "plot_density", "plot_khat", "plot_paths", "plot_rank_ecdf", "plot_training"]


@runtime_checkable
class HasLosses(Protocol):
    """What :func:`stochdyn.fit` returns, as far as its curve goes."""

    losses: Tensor
    bound: str


Values = Tensor | np.ndarray | Sequence[float]

_MEANING = {
    "evidence_lower": "negative ELBO (nats)",
    "kl_upper": "upper bound on the divergence (nats)",
    "residual": "residual",
    "surrogate": "loss",
}


def plot_paths(
    ts: Values,
    draws: Tensor | np.ndarray,
    *,
    observations: tuple[Values, Values] | None = None,
    forecast_from: float | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    num_paths: int = 0,
    label: str = "posterior",
    colour: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw paths as a fan: nested central intervals, the median, the data on top.

    Args:
        ts: ``(T,)`` increasing times.
        draws: ``(S, T)`` of one component of the path.
        observations: times and values of the data, ``(n,)`` each; NaN values are left out.
        forecast_from: time from which the background is shaded as forecast.
        levels: probabilities of the intervals, in (0, 1).
        num_paths: how many of the draws to draw as lines.
        label: name of the law in the legend.
        colour: Matplotlib colour.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        TimeGridError: if the times don't increase.
        ShapeError: if draws or observations don't fit their times.
        TooFewDrawsError: with fewer than two draws.
        NonFiniteError: if a draw isn't finite.
        InvalidInputError: if a level isn't inside (0, 1).

    Example:
        >>> ax = plot_paths(torch.linspace(0, 1, 5), torch.randn(100, 5), levels=(0.9,))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['posterior: 90 %', 'posterior: median']
    """
    grid = _tensor(ts)
    check_time_grid(grid)
    paths = _tensor(draws)
    if paths.ndim != 2 or paths.shape[1] != grid.shape[0]:
        raise ShapeError(
            "draws don't fit ts", got=f"shape {tuple(paths.shape)}", expected=f"(draws, {grid.shape[0]})"
        )
    if paths.shape[0] < 2:
        raise TooFewDrawsError("too few draws for a fan", got=paths.shape[0], expected="at least 2")
    check_finite(paths, "draws")
    _check_levels(levels)
    check_positive_int(num_paths, "num_paths", minimum=0)
    ax = _axes(ax)
    t = grid.numpy()
    for level in sorted(levels, reverse=True):
        low, high = torch.quantile(paths, paths.new_tensor([(1 - level) / 2, (1 + level) / 2]), dim=0).numpy()
        name = f"{label}: {100 * level:g} %"
        ax.fill_between(t, low, high, color=colour, alpha=0.15 + 0.25 * (1 - level), linewidth=0, label=name)
    median = torch.quantile(paths, 0.5, dim=0).numpy()
    ax.plot(t, median, color=colour, label=f"{label}: median")
    for path in paths[:num_paths].numpy():
        ax.plot(t, path, color=colour, alpha=0.4, linewidth=0.6)
    if observations is not None:
        when, what = _tensor(observations[0]), _tensor(observations[1])
        if when.ndim != 1 or when.shape != what.shape:
            raise ShapeError("observations don't fit", got=f"{tuple(when.shape)} and {tuple(what.shape)}")
        seen = ~what.isnan()
        ax.plot(when[seen].numpy(), what[seen].numpy(), "k.", markersize=4, label="data", zorder=3)
    ax.set_xlim(t[0], t[-1])
    if forecast_from is not None:
        ax.axvspan(forecast_from, t[-1], color="0.5", alpha=0.12, linewidth=0, label="forecast")
    ax.set_xlabel("time")
    ax.set_ylabel("value")
    ax.legend()
    return ax


def plot_training(
    losses: Any, *, bound: str | None = None, window: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a training curve, the raw losses and their running mean.

    Args:
        losses: ``(steps,)``, or what :func:`stochdyn.fit` returns.
        bound: what the loss means, as in :class:`stochdyn.ObjectiveValue`; by default that of the result.
        window: steps of the running mean, which lies at its window's end; a fiftieth of all by default.
        ax: where to draw; new axes if None.

    Returns:
        The axes. They show all smoothed losses and the last 90 % of the raw ones.

    Raises:
        EmptyDataError: if there are no losses.
        ShapeError: if they have more than one axis.
        InvalidInputError: if the bound is unknown.

    Example:
        >>> plot_training(torch.rand(100), bound="evidence_lower").get_ylabel()
        'negative ELBO (nats)'
    """
    if isinstance(losses, HasLosses):
        bound = losses.bound if bound is None else bound
        losses = losses.losses
    bound = "surrogate" if bound is None else bound
    if bound not in _MEANING:
        raise InvalidInputError("bound is unknown", got=repr(bound), expected=" | ".join(map(repr, _MEANING)))
    values = _tensor(losses)
    check_nonempty(values, "losses")
    if values.ndim != 1:
        raise ShapeError("losses have the wrong number of axes", got=tuple(values.shape), expected="(steps,)")
    window = max(1, values.shape[0] // 50) if window is None else window
    check_positive_int(window, "window")
    window = min(window, values.shape[0])
    smooth = values.unfold(0, window, 1).mean(-1)
    ax = _axes(ax)
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
    ax.legend()
    return ax


def plot_rank_ecdf(
    result: SBCResult, names: Sequence[str] | None = None, *, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Draw how the distribution function of ranks differs from the uniform one, with its simultaneous band.

    A curve that leaves the band shows miscalibration: above zero on the left and below on the right means
    posteriors too narrow, the reverse too wide, and one sign throughout bias.

    Args:
        result: of :func:`stochdyn.diagnostics.sbc`.
        names: quantities to draw; all if None.
        level: probability that the ranks of exact inference stay in the band.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        InvalidInputError: if there is no such quantity.

    Example:
        >>> from stochdyn.diagnostics import SBCResult
        >>> plot_rank_ecdf(SBCResult({"rate": np.arange(100)}, num_draws=99)).get_xlabel()
        'fractional rank of the truth'

    Reference:
        Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison", 2022.
    """
    from stochdyn.diagnostics.uniformity import ecdf_band, rank_ecdf, rank_points

    chosen = _chosen(result, names)
    points = rank_points(result.num_draws + 1)
    band = ecdf_band(len(result.ranks[chosen[0]]), points, level)
    ax = _axes(ax)
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
        ax.plot(x, ends(ecdf), drawstyle="steps-mid", label=name)
    ax.axhline(0.0, color="k", linewidth=0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("fractional rank of the truth")
    ax.set_ylabel("ECDF difference")
    ax.legend()
    return ax


def plot_coverage(
    result: SBCResult, names: Sequence[str] | None = None, *, num_levels: int = 19, ax: Axes | None = None
) -> Axes:
    """Draw how often central intervals contain the truth, against how often they should.

    Args:
        result: of :func:`stochdyn.diagnostics.sbc`.
        names: quantities to draw; all if None.
        num_levels: how many interval probabilities, equally spaced inside (0, 1).
        ax: where to draw; new axes if None.

    Returns:
        The axes. The band is two binomial standard errors at either side, at each level alone.

    Raises:
        InvalidInputError: if there is no such quantity.

    Example:
        >>> from stochdyn.diagnostics import SBCResult
        >>> plot_coverage(SBCResult({"rate": np.arange(100)}, num_draws=99)).get_ylabel()
        'observed coverage'
    """
    chosen = _chosen(result, names)
    check_positive_int(num_levels, "num_levels")
    tables = result.coverage(np.arange(1, num_levels + 1) / (num_levels + 1))
    ax = _axes(ax)
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
    ax.legend()
    return ax


def plot_khat(log_weights: Tensor | np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw the largest importance weights on log axes beside the Pareto tail fitted to them, which k-hat describes.

    Args:
        log_weights: ``(S,)``.
        ax: where to draw; new axes if None.

    Returns:
        The axes: the weight over the mean weight against the fraction of draws above it.

    Raises:
        TooFewDrawsError, NonFiniteError: as :func:`stochdyn.diagnostics.pareto_smooth`.
        ShapeError: if there is more than one axis.

    Example:
        >>> plot_khat(torch.randn(1000)).get_ylabel()
        'weight / mean weight'
    """
    from stochdyn.diagnostics.psis import pareto_smooth

    lw = _tensor(log_weights)
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
    ax = _axes(ax)
    ax.loglog(above.numpy(), raw, "k.", markersize=3, label="weights")
    ax.loglog(above.numpy(), fitted, color=colour, label="Pareto smoothed")
    ax.set_title(f"k-hat = {k:.2f}: {verdict}")
    ax.set_xlabel("fraction of draws above")
    ax.set_ylabel("weight / mean weight")
    ax.legend()
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
        draws: ``(S,)``; further axes, such as chains, are joined.
        references: values to mark, by name in the legend.
        level: probability of the shaded interval.
        label: name in the legend.
        xlabel: name of the quantity.
        colour: Matplotlib colour.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        TooFewDrawsError: with fewer than ten draws.
        NonFiniteError: if a draw isn't finite.
        InvalidInputError: if the level isn't inside (0, 1), or all draws are equal.

    Example:
        >>> ax = plot_density(torch.randn(500), references={"truth": 0.0}, xlabel="rate")
        >>> ax.get_xlabel(), ax.get_legend().get_texts()[-1].get_text()
        ('rate', 'truth')
    """
    from scipy import stats

    values = _tensor(draws).flatten()
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
    ax = _axes(ax)
    ax.plot(x, estimate(x), color=colour, label=label)
    inner = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    ax.fill_between(inner, estimate(inner), color=colour, alpha=0.2, linewidth=0, label=f"{100 * level:g} %")
    for i, (name, value) in enumerate((references or {}).items()):
        ax.axvline(float(value), color="k", linestyle=("--", ":", "-.", "-")[i % 4], label=name)
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("density")
    ax.legend()
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("Matplotlib is not installed", hint="pip install matplotlib") from error
    return pyplot.subplots()[1]


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().double().cpu()


def _check_levels(levels: Sequence[float]) -> None:
    if not levels or not all(0 < level < 1 for level in levels):
        raise InvalidInputError("levels must lie strictly between 0 and 1", got=tuple(levels))


def _chosen(result: SBCResult, names: Sequence[str] | None) -> list[str]:
    chosen = list(result.ranks) if names is None else list(names)
    missing = [name for name in chosen if name not in result.ranks]
    if missing or not chosen:
        raise InvalidInputError(
            "no such quantity", got=", ".join(missing) or None, expected=", ".join(result.ranks)
        )
    return chosen
