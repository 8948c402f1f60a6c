"""The roughness of paths that are observed with errors: logarithms of realised variances, tracks of particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_seed,
    as_tensor,
    check_bool,
    check_hurst,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn.diagnostics.container import from_draws
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.fractional.hurst.check import warn_of
from stochdyn.fractional.hurst.data import Block, read_series, read_times, steps_between
from stochdyn.fractional.hurst.laws import Law
from stochdyn.fractional.hurst.solve import Problem, solve

__all__ = ["averaged_autocovariance", "infer_roughness"]

_SHORTEST, _SHORTEST_ALONE = 5, 20


def averaged_autocovariance(num_lags: int, hurst: Tensor | float, dt: float = 1.0) -> Tensor:
    r"""Return the autocovariance of the increments of fractional Brownian motion that is averaged over each step.

    With :math:`Y_i=\frac1\Delta\int_{(i-1)\Delta}^{i\Delta}B^H_s\,ds`,

    .. math::
        \mathrm{Cov}(Y_{i+1}-Y_i,Y_{i+k+1}-Y_{i+k})=\tfrac12\Delta^{2H}\,\delta^4g(k),\qquad
        g(x)=\frac{|x|^{2H+2}}{(2H+1)(2H+2)},

    where :math:`\delta^4g(k)=g(k+2)-4g(k+1)+6g(k)-4g(k-1)+g(k-2)`: averaging is a convolution of the autocovariance with a
    triangle, whose second derivative is a second difference.

    Args:
        num_lags: The number of lags, from 0 on.
        hurst: Hurst index, ``(*batch)``.
        dt: The time between observations, and the length of each average.

    Returns:
        ``(*batch, num_lags)``, float64, differentiable in the Hurst index.

    Example:
        >>> averaged_autocovariance(2, 0.5)  # Brownian motion: 2/3 and 1/6
        tensor([0.6667, 0.1667], dtype=torch.float64)
    """
    check_positive_int(num_lags, "num_lags")
    check_positive(dt, "dt")
    check_hurst(hurst)
    h = torch.as_tensor(hurst, dtype=torch.float64)[..., None]
    lags = torch.arange(-2, num_lags + 2, dtype=torch.float64, device=h.device).abs()
    # The second derivative of 0^p in p is NaN in torch: leave the base 0 out.
    power = torch.where(lags > 0, lags.clamp_min(1.0) ** (2 * h + 2), 0.0)
    g = power / ((2 * h + 1) * (2 * h + 2))
    difference = g[..., 4:] - 4 * g[..., 3:-1] + 6 * g[..., 2:-2] - 4 * g[..., 1:-3] + g[..., :-4]
    return 0.5 * dt ** (2 * h) * difference


def infer_roughness(
    path: object,
    dt: float | None = None,
    obs_scale: float | Sequence[float] | None = None,
    averaged: bool | float = False,
    num_draws: int = 1000,
    seed: int | None = 0,
    *,
    times: object = None,
    drift: bool = True,
    hierarchy: bool = False,
    shared_scale: bool = True,
    progress: bool = True,
) -> Any:
    r"""Return the exact posterior of the Hurst index of paths that are observed with independent errors.

    .. math::
        y_n=y_0+\mu n+\sigma\bar B^H_{n\Delta}+\eta\,\epsilon_n,\qquad H\sim U(0,1),\quad p(\mu,\sigma)\propto1/\sigma,

    where the share of the errors in the variance of an increment is uniform a priori, and the bar a time average where there is one.
    Errors roughen a path, so a series whose errors are left out looks as if its index were smaller; averages smooth it, so that it
    looks larger. The logarithm of a realised variance suffers both: it estimates an integral over the day, from M returns with a
    standard error of about :math:`\sqrt{2/M}`. So do the tracks of particles, by errors of localisation and motion blur.

    Level, drift and scale are integrated in closed form, and Hurst index and share of errors by quadrature, so the draws are independent
    and exact, whatever the drift. Tracks share their Hurst index, and for each axis the scale and the error.

    Args:
        path: The observed levels ``(n,)``, not their differences, or a track ``(n, d)`` in d dimensions; or a list of such, of
            lengths from 5 on. NaN marks missing values.
        dt: The time between observations, the step that errors, averages and ``deviation`` refer to. If None, one where no times are
            given, otherwise the median of the steps between these.
        obs_scale: The standard deviation of the errors if it is known, one or one per axis; None learns it, 0 assumes there are none.
        averaged: Whether each observation is the average of the path over the step that ends there, as a realised variance is;
            or the part of the step that is averaged over, as for an exposure time.
        num_draws: The number of draws from the posterior.
        seed: The seed of the draws; None takes a fresh one.
        times: The times of the observations if they aren't regular; a list for several paths.
        drift: Whether paths may have a drift, each its own.
        hierarchy: Whether each path has a Hurst index of its own, :math:`\operatorname{logit}H_i\sim N(m,\tau^2)`; scales and errors
            are then its own too.
        shared_scale: Whether all paths have the scale and the error in common, for each axis.
        progress: Whether to show a bar where it takes more than two seconds.

    Returns:
        ArviZ container: ``posterior`` (``hurst``, ``scale`` :math:`\sigma` per unit time, ``deviation`` of an increment without its
        errors, ``drift`` per unit time, ``obs_scale`` if it was learnt, and for a hierarchy ``hurst_center`` and ``hurst_width``),
        ``observed_data``; attributes ``check_memory``, ``check_season``, ``check_outlier``, ``seed``. Axes: ``path_index`` of
        what isn't shared, then ``axis``.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError, InvalidInputError: For paths that are empty, too short,
            infinite, straight, or of unequal dimensions, or a negative or infinite ``obs_scale``.

    Warns:
        StochdynWarning: If the prediction errors show what fractional noise has not, or the posterior piles up at a bound.

    Example:
        >>> from stochdyn.fractional import sample_fbm
        >>> path = sample_fbm(0.3, 200, horizon=200.0, generator=torch.Generator().manual_seed(0))
        >>> idata = infer_roughness(path, obs_scale=0.0)
        >>> bool(abs(idata.posterior["hurst"].mean() - 0.3) < 0.15)
        True

    Reference:
        A. J. Berglund, Statistics of camera-based single-particle tracking, Phys. Rev. E 82, 2010 (errors and blur).
    """
    if dt is not None:
        check_positive(dt, "dt")
    check_positive_int(num_draws, "num_draws")
    for name, value in (("drift", drift), ("hierarchy", hierarchy), ("shared_scale", shared_scale)):
        check_bool(value, name)
    start = None if seed is None else as_seed(seed)
    window = float(averaged)
    if not 0 <= window <= 1:
        raise InvalidInputError("averaged must be a bool, or a part of the step from 0 to 1", got=averaged)
    data = read_series(path, "path", _SHORTEST)
    if len(data) == 1 and data[0].shape[1] == 1:
        read_series(path, "path", _SHORTEST_ALONE)
    if hierarchy and len(data) < 2:
        raise InvalidInputError("a hierarchy needs several paths", got=len(data))
    axes = data[0].shape[1]
    errors = _errors(obs_scale, axes)
    if dt is None:
        dt = 1.0 if times is None else float(np.median(steps_between(times, data)))
    ends = read_times(times, data, float(dt))
    own = hierarchy or not shared_scale
    groups: list[list[Block]] = [[] for _ in range(axes * (len(data) if own else 1))]
    for s, (x, t) in enumerate(zip(data, ends, strict=True)):
        for a in range(axes):
            g = (s * axes if own else 0) + a
            groups[g].append(_block(x[:, a], t, s, a, g, times is None, drift, len(data) == 1))
    _share_units(groups)
    none = errors is not None and not any(errors)
    law = Law("none" if none else "errors", window)
    known: list[float | None] = [None] * len(groups)
    if errors is not None and not none:
        known = [errors[g[0].axis] / g[0].unit for g in groups]
        if 0.0 in known:
            raise InvalidInputError("obs_scale must be zero on all axes or on none", got=list(errors))
    problem = Problem(groups, law, True, known, hierarchy, progress, "infer_roughness")
    draws = solve(problem, num_draws, np.random.default_rng(start))
    warn_of(draws.checks, draws.hurst, path=True, bounds=True, stacklevel=2)

    # an increment over one step has the deviation of the whole without the share of the errors
    units = np.array([g[0].unit for g in groups])
    total = draws.total * units
    share = draws.other if law.beside == "errors" else np.zeros_like(draws.other)
    deviation = total * np.sqrt(1 - share)
    pure = np.stack([law.pure(1, h)[:, 0] for h in draws.hurst.T], 1)
    found = {"scale": deviation / np.sqrt(pure) * float(dt) ** (-draws.hurst), "deviation": deviation}
    if errors is None:
        found["obs_scale"] = total * np.sqrt(share / 2)
    shape = (num_draws, *((len(data),) if own and len(data) > 1 else ()), *((axes,) if axes > 1 else ()))
    names = [*(["path_index"] if own and len(data) > 1 else []), *(["axis"] if axes > 1 else [])]
    posterior = {name: v.reshape(shape)[None] for name, v in found.items()}
    dims = dict.fromkeys(posterior, names)
    if drift:
        slopes = np.stack([
            np.stack([b.mean_coefficients(draws.coefficients[b.group][groups[b.group].index(b)])[:, 0]
                      for b in sorted((b for g in groups for b in g if b.series == s), key=lambda b: b.axis)], 1)
            for s in range(len(data))
        ], 1)  # fmt: skip
        slopes = slopes / float(dt)
        kept = (num_draws, *((len(data),) if len(data) > 1 else ()), *((axes,) if axes > 1 else ()))
        posterior["drift"] = slopes.reshape(kept)[None]
        dims["drift"] = [*(["path_index"] if len(data) > 1 else []), *(["axis"] if axes > 1 else [])]
    if draws.population is not None:
        posterior["hurst"] = draws.hurst[:, ::axes][None]
        dims["hurst"] = ["path_index"]
        posterior["hurst_center"] = (1 / (1 + np.exp(-draws.population[0])))[None]
        posterior["hurst_width"] = draws.population[1][None]
    else:
        posterior["hurst"] = draws.hurst[:, 0][None]
    observed = {}
    for s, x in enumerate(data):
        name = "path" if len(data) == 1 else f"path_{s}"
        observed[name] = x[:, 0] if axes == 1 else x
        dims[name] = ["time" if len(data) == 1 else f"time_{s}", *(["axis"] if axes > 1 else [])]
    attrs: dict[str, str | int | float] = {
        "estimator": "exact",
        "khat": -math.inf,  # draws of the posterior itself need no weights
        "check_memory": draws.checks.memory,
        "check_season": draws.checks.season,
        "check_outlier": draws.checks.outlier,
    }
    if start is not None:
        attrs["seed"] = start
    return from_draws(
        posterior, observed_data=observed, constant_data={"dt": np.asarray(float(dt))}, dims=dims, attrs=attrs
    )


def _errors(obs_scale: object, axes: int) -> list[float] | None:
    """One known deviation per axis, or None."""
    if obs_scale is None:
        return None
    if isinstance(obs_scale, int | float):
        given: list[Any] = [obs_scale] * axes
    else:
        given = as_tensor(obs_scale, "obs_scale", 1, "(axes,)", finite=False).tolist()
    if len(given) != axes:
        raise ShapeError("obs_scale must be one number, or one per axis", got=len(given), expected=axes)
    for value in given:
        check_real(value, "obs_scale")
        if not 0 <= float(value) < float("inf"):
            raise InvalidInputError("obs_scale must be finite and not negative", got=value)
    return [float(v) for v in given]


def _block(
    x: np.ndarray, t: np.ndarray, series: int, axis: int, group: int, regular: bool, drift: bool, alone: bool
) -> Block:
    """Differences of one component between the times where it was observed."""
    seen = ~np.isnan(x)
    times = t[seen]
    complete = regular and bool(seen.all())
    design = np.diff(times)[:, None] if drift else np.zeros((len(times) - 1, 0))
    block = Block(
        np.diff(x[seen]), times, design, series, axis, group, len(times) - 1 if complete else None
    )  # fmt: skip
    block.standardise("path" if alone else f"path[{series}]", straight=True)
    return block


def _share_units(groups: list[list[Block]]) -> None:
    """Blocks with a common scale need a common unit."""
    for group in groups:
        unit = float(np.sqrt(np.mean([b.unit**2 for b in group])))
        for b in group:
            b.values = b.values * (b.unit / unit)
            b.unit = unit
