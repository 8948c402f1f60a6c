"""Exact inference of the Hurst index of series of stationary increments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.signal import lfilter

from stochdyn._checks import as_seed, as_tensor, check_bool, check_choice, check_positive, check_positive_int
from stochdyn.diagnostics.container import from_draws
from stochdyn.errors import InvalidInputError, NonFiniteError
from stochdyn.fractional.exact.fbm import sample_fgn
from stochdyn.fractional.hurst.check import warn_of
from stochdyn.fractional.hurst.data import Block, columns_of, read_series, read_times, steps_between
from stochdyn.fractional.hurst.laws import Law
from stochdyn.fractional.hurst.solve import WHITTLE_FROM, Draws, Problem, solve

__all__ = ["infer_hurst"]

_SHORTEST = 5
_SHORTEST_ALONE = 8
_REPLICATED = 2e7  # numbers of posterior predictive draws
_BURN_IN = 1e-12
_NO_WAVE = 1e-6


def infer_hurst(
    series: object,
    dt: float | None = None,
    num_draws: int = 1000,
    seed: int | None = 0,
    *,
    times: object = None,
    regressors: object = None,
    trend: bool = False,
    season: float | Sequence[float] | None = None,
    short_memory: Literal["white", "ar1"] | None = None,
    hierarchy: bool = False,
    predictive: bool = True,
    progress: bool = True,
) -> Any:
    r"""Return the exact posterior of Hurst index, mean and scale of series of stationary increments.

    .. math::
        y_k=z_k\cdot\beta+\sigma\,(B^H_{k\Delta}-B^H_{(k-1)\Delta}),\qquad
        H\sim U(0,1),\quad p(\beta,\sigma)\propto1/\sigma .

    Mean, regression and scale are integrated in closed form and the Hurst index by quadrature, so the draws are independent and
    exact, and nothing has to converge. A constant added to the series, or another unit of it, changes the answer by
    rounding alone. For a path (a level that wanders) take its differences, or :func:`infer_roughness`, which allows for
    errors of observation. The one-step prediction errors are tested each time, and a warning names what doesn't fit.

    Args:
        series: The stationary increments ``(n,)``, or ``(n, d)`` components with one Hurst index; or a list of such, of lengths
            from 5 on, that share it. NaN marks missing values.
        dt: The time between the ends of an increment; ``scale`` is per unit time, ``mean`` per increment. If None, one where no times
            are given, otherwise the shortest step between these.
        num_draws: The number of draws from the posterior.
        seed: The seed of the draws; None takes a fresh one.
        times: The ends ``(n,)`` of the increments, if they aren't regular (each still lasts ``dt``); a list for several series.
        regressors: The covariates ``(n, k)`` of the mean; a list for several series. A constant is always there.
        trend: Whether the mean has a slope in time.
        season: One or several periods, in units of time, of cycles in the mean.
        short_memory: What there is beside long memory: ``"white"`` noise, or ``"ar1"``, the noise passed through
            :math:`y_k=\phi y_{k-1}+x_k`.
        hierarchy: Whether each series has a Hurst index of its own, :math:`\operatorname{logit}H_i\sim N(m,\tau^2)`.
        predictive: Whether to draw replicated series too (of regular series, up to 20 million numbers).
        progress: Whether to show a bar where it takes more than two seconds.

    Returns:
        ArviZ container: ``posterior`` (``hurst``, ``mean``, ``scale``, and by option ``coefficients``, ``phi``,
        ``white_scale``, ``hurst_center`` and ``hurst_width``), ``posterior_predictive`` and ``observed_data``
        (``series``), ``log_likelihood`` (each observed value given those observed before it; where values are missing, the observed
        ones alone, along ``series_seen``, whose coordinate is their position); attributes ``check_memory``,
        ``check_season`` and ``check_outlier`` (p-values of the prediction errors), ``likelihood`` (``"exact"``, or
        ``"whittle"`` for more than 30 000 values), ``khat`` (minus infinity: exact draws), ``seed``.
        Several series have the axes ``series`` and ``component``.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError, InvalidInputError: For series that are empty, too short,
            infinite, constant or of unequal components, and for options that don't fit.

    Warns:
        StochdynWarning: If the prediction errors show short memory, a cycle or an outlier, or if the posterior piles up at
            a bound, as it does for a path taken for increments.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> idata = infer_hurst(nile_minima().level, num_draws=2000)
        >>> bool(abs(idata.posterior["hurst"].mean() - 0.83) < 0.01)
        True

    Reference:
        J. Beran, Statistics for long-memory processes, Chapman & Hall 1994; A. M. Sykulski et al., Biometrika 106, 2019
        (long series).
    """
    if dt is not None:
        check_positive(dt, "dt")
    check_positive_int(num_draws, "num_draws")
    for name, value in (("trend", trend), ("hierarchy", hierarchy), ("predictive", predictive)):
        check_bool(value, name)
    if short_memory is not None:
        check_choice(short_memory, ("white", "ar1"), "short_memory")
    start = None if seed is None else as_seed(seed)
    data = read_series(series, "series", _SHORTEST)
    if len(data) == 1 and data[0].shape[1] == 1:
        read_series(series, "series", _SHORTEST_ALONE)
    if dt is None:
        dt = 1.0 if times is None else float(steps_between(times, data).min())
    ends = read_times(times, data, float(dt))
    if times is not None and short_memory == "ar1":
        raise InvalidInputError("an autoregression needs regular times", hint="mark missing values with NaN")
    if hierarchy and len(data) < 2:
        raise InvalidInputError("a hierarchy needs several series", got=len(data))
    columns = _mean_columns(ends, columns_of(regressors, data), trend, season, float(dt))
    blocks: list[Block] = []
    for s, (x, t, z) in enumerate(zip(data, ends, columns, strict=True)):
        for a in range(x.shape[1]):
            seen = ~np.isnan(x[:, a])
            if np.isnan(z[seen]).any():
                raise NonFiniteError("regressors must be there wherever the series was observed", got="NaN")
            if seen.sum() <= z.shape[1] + 2:
                raise InvalidInputError(
                    "there are too few values for so many regressors", got=f"{int(seen.sum())} values, {z.shape[1]} regressors"
                )  # fmt: skip
            regular = times is None
            length = len(x) if regular else None
            block = Block(x[seen, a], t[seen], z[seen], s, a, len(blocks), length)
            block.standardise("series" if len(data) == 1 else f"series[{s}]")
            block.fill_gaps()
            blocks.append(block)
    law = Law(short_memory or "none")
    problem = Problem(
        [[b] for b in blocks], law, False, [None] * len(blocks), hierarchy, progress, "infer_hurst"
    )
    rng = np.random.default_rng(start)
    draws = solve(problem, num_draws, rng)
    warn_of(draws.checks, draws.hurst, path=False, bounds=True, stacklevel=2)
    return _container(data, blocks, law, draws, float(dt), start, predictive, rng)


def _mean_columns(
    ends: list[np.ndarray],
    given: list[np.ndarray],
    trend: bool,
    season: float | Sequence[float] | None,
    dt: float,
) -> list[np.ndarray]:
    """A constant, the slope, a sine and cosine per period, and the covariates, ``(n, p)`` for each series."""
    periods = (
        []
        if season is None
        else as_tensor(season, "season", (0, 1), "one or several periods").reshape(-1).tolist()
    )
    if not all(period > 0 for period in periods):
        raise InvalidInputError("season must be positive", got=periods)
    found = []
    for t, z in zip(ends, given, strict=True):
        columns = [np.ones((len(t), 1))]
        if trend:
            columns.append((t - t.mean())[:, None])
        for period in periods:
            angle = 2 * math.pi * np.mod(t * dt / float(period), 1.0)
            cycle = np.stack([np.cos(angle), np.sin(angle)], 1)
            # A sine that is zero at all times, such as that of two steps, leaves rounding errors.
            columns.append(cycle[:, np.abs(cycle).max(0) > _NO_WAVE])
        found.append(np.concatenate([*columns, z], axis=1))
    return found


def _container(
    data: list[np.ndarray], blocks: list[Block], law: Law, draws: Draws, dt: float,
    seed: int | None, predictive: bool, rng: np.random.Generator,
) -> Any:  # fmt: skip
    count = draws.hurst.shape[0]
    hurst, other = draws.hurst, draws.other
    mean, scale, white, coefficients = [], [], [], []
    for g, block in enumerate(blocks):
        beta = block.mean_coefficients(draws.coefficients[g][0])
        mean.append(beta[:, 0])
        coefficients.append(beta[:, 1:])
        total = block.unit * draws.total[:, g]
        scale.append(total / np.sqrt(law.variance(hurst[:, g], other[:, g])) * dt ** (-hurst[:, g]))
        white.append(total * np.sqrt(other[:, g]) if law.beside == "white" else None)

    single = len(data) == 1
    components = data[0].shape[1]

    def by_block(rows: list[np.ndarray]) -> np.ndarray:
        """``(1, S, [series], [component], ...)``."""
        stacked = np.stack(rows, axis=1).reshape(count, len(data), components, *rows[0].shape[1:])
        if components == 1:
            stacked = stacked[:, :, 0]
        return (stacked[:, 0] if single else stacked)[None]

    axes = ([] if single else ["series_index"]) + ([] if components == 1 else ["component"])
    posterior = {"mean": by_block(mean), "scale": by_block(scale)}
    dims = dict.fromkeys(("mean", "scale", "phi", "white_scale"), axes)
    if draws.population is not None:
        posterior["hurst"] = hurst[:, ::components][None]
        dims["hurst"] = ["series_index"]
        posterior["hurst_center"] = (1 / (1 + np.exp(-draws.population[0])))[None]
        posterior["hurst_width"] = draws.population[1][None]
    else:
        posterior["hurst"] = hurst[:, 0][None]
    if coefficients[0].shape[1]:
        posterior["coefficients"] = by_block(coefficients)
        dims["coefficients"] = [*axes, "regressor"]
    if law.beside == "ar1":
        posterior["phi"] = by_block(list(other.T))
    if law.beside == "white":
        posterior["white_scale"] = by_block([w for w in white if w is not None])
    observed, replicated, pointwise, coords = {}, {}, {}, {}
    for s, x in enumerate(data):
        name = "series" if single else f"series_{s}"
        observed[name] = x[:, 0] if components == 1 else x
        dims[name] = ["time" if single else f"time_{s}"] + ([] if components == 1 else ["component"])
        own = [g for g, b in enumerate(blocks) if b.series == s]
        if predictive and all(blocks[g].length is not None for g in own) and x.size * count <= _REPLICATED:
            rows = [_replicate(blocks[g], law, draws, g, x.shape[0], rng) for g in own]
            replicated[name] = (rows[0] if components == 1 else np.stack(rows, -1))[None]
        seen = ~np.isnan(x)
        rows = []
        for g in own:
            density = draws.log_likelihood[g][0]
            if density is None:
                break
            row = np.full((count, len(x)), np.nan)
            row[:, seen[:, blocks[g].axis]] = density - math.log(blocks[g].unit)
            rows.append(row)
        else:
            table = rows[0] if components == 1 else np.stack(rows, -1)
            if seen.all():
                pointwise[name] = table[None]
            else:
                # What was missing is no observation: leave-one-out must not count it.
                pointwise[name] = table.reshape(count, -1)[:, seen.reshape(-1)][None]
                dims[f"log_likelihood/{name}"] = [f"{name}_seen"]
                coords[f"{name}_seen"] = np.flatnonzero(seen)
    attrs: dict[str, str | int | float] = {
        "estimator": "exact",
        "khat": -math.inf,  # draws of the posterior itself need no weights
        "likelihood": "whittle" if len(blocks) == 1 and len(blocks[0].values) > WHITTLE_FROM else "exact",
        "check_memory": draws.checks.memory,
        "check_season": draws.checks.season,
        "check_outlier": draws.checks.outlier,
    }
    if seed is not None:
        attrs["seed"] = seed
    return from_draws(
        posterior, posterior_predictive=replicated, log_likelihood=pointwise, observed_data=observed,
        constant_data={"dt": np.asarray(dt)}, coords=coords, dims=dims, attrs=attrs,
    )  # fmt: skip


def _replicate(block: Block, law: Law, draws: Draws, g: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Replicated series ``(S, n)`` on the whole regular grid; missing where the data are."""
    hurst, other, total = draws.hurst[:, g], draws.other[:, g], block.unit * draws.total[:, g]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    lead = 0
    if law.beside == "ar1":
        lead = min(20 * n, math.ceil(math.log(_BURN_IN) / math.log(max(float(np.abs(other).max()), 1e-3))))
    noise = sample_fgn(torch.from_numpy(hurst), n + lead, generator=generator).numpy()
    if law.beside == "ar1":
        noise = np.stack([lfilter([1.0], [1.0, -p], row) for p, row in zip(other, noise, strict=True)])[
            :, lead:
        ]
        noise = noise / np.sqrt(law.variance(hurst, other))[:, None]
    if law.beside == "white":
        noise = np.sqrt(1 - other)[:, None] * noise + np.sqrt(other)[:, None] * rng.standard_normal(
            noise.shape
        )
    found = np.full((len(hurst), n), np.nan)
    found[:, block.place] = block.fitted(draws.coefficients[g][0]) + total[:, None] * noise[:, block.place]
    return found
