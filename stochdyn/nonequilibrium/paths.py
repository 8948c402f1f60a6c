"""Dissipation along trajectories: with a known current, from trajectories alone, and fluctuation theorems."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_positive_int, check_real, check_type
from stochdyn.core.law.path import Estimate
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError
from stochdyn.nonequilibrium.current import SteadyCurrent

__all__ = ["ShortTimeEntropy", "dissipation", "integral_theorem", "short_time_entropy"]


def dissipation(paths: object, ts: object, current: SteadyCurrent) -> Tensor:
    r"""Return the entropy produced along trajectories of the steady state, ``(*sample,)``.

    .. math:: S=\int v\cdot D^{+}\circ dX

    in the Stratonovich sense, by the trapezoid rule: right also for noise that depends on the state, where the log-ratio of
    Euler densities is wrong at order one. The error is of first order in the step.

    Args:
        paths: ``(*sample, T, d)`` states.
        ts: ``(T,)`` their times.
        current: the steady current.
    """
    check_type(current, SteadyCurrent, "current")
    grid = as_time_grid(ts)
    x = as_tensor(paths, "paths")
    if x.ndim < 2 or x.shape[-2] != len(grid):
        raise ShapeError("paths must be (*sample, T, d)", got=tuple(x.shape), expected=f"T = {len(grid)}")
    force = current._velocity_and_force(current._at(x))[1].detach()
    return (0.5 * (force[..., 1:, :] + force[..., :-1, :]) * (x[..., 1:, :] - x[..., :-1, :])).sum((-2, -1))


def integral_theorem(s: object) -> Estimate:
    r"""Return the estimate of :math:`E[e^{-S}]`, which is one for entropy production by a fluctuation theorem.

    Args:
        s: ``(n,)`` entropy produced along independent trajectories.

    Warns:
        ApproximationWarning: where the mean is decided by rare trajectories that the sample doesn't hold: a variance above
            :math:`2\log n`. The estimate and its error mean nothing then.
    """
    values = as_tensor(s, "s", 1, "(n,)").double()
    if len(values) < 2:
        raise ShapeError("s needs at least two trajectories", got=len(values))
    if float(values.var()) > 2 * math.log(len(values)):
        warnings.warn(
            f"The variance of the entropy production ({float(values.var()):.3g}) is too large for {len(values)} trajectories: "
            "rare ones decide the mean. Take shorter ones.",
            ApproximationWarning,
            stacklevel=2,
        )
    return Estimate.of((-values).exp())


@dataclass(frozen=True)
class ShortTimeEntropy:
    """Entropy production from trajectories alone.

    Attributes:
        rate: the estimate in 1/time, extrapolated over the lags.
        stderr: its standard error, from blocks.
        per_lag: the cross-fitted estimate at each lag.
        in_sample: the estimate without cross-fitting, which is too large by about ``2 p / T``.
    """

    rate: float
    stderr: float
    per_lag: dict[int, float]
    in_sample: float


def short_time_entropy(
    paths: object,
    dt: float,
    features: str | Callable[[Tensor], Tensor] = "linear",
    lags: tuple[int, ...] = (1, 2),
    folds: int = 2,
    num_blocks: int = 20,
) -> ShortTimeEntropy:
    r"""Estimate the entropy production rate of a steady state from trajectories alone, without its equation.

    Currents :math:`j_k=\phi_k(x_m)\circ dx` with mean rates m and covariance rates G bound the rate by
    :math:`2m^\top G^{-1}m`. The bound is tight for short steps if the features can express :math:`D^{-1}v`. In sample it is too large by
    twice the number of features over the total time; here the coefficients come from other parts of the data than the
    currents (cross-fitting), which removes this bias, and two lags are extrapolated to zero.

    Args:
        paths: ``(T, d)`` or ``(n, T, d)`` states at equal times.
        dt: the time between them.
        features: ``"linear"``, all products :math:`x_i\circ dx_j` and the steps themselves, or a function of
            ``(..., d)`` that returns coefficients ``(..., K, d)``.
        lags: numbers of steps, one or two.
        folds: number of parts for cross-fitting.
        num_blocks: blocks for the standard error.

    The answer is a lower bound where the features are too few, states are hidden or the noise of measurement is not small:
    an estimate that rises with the lag is limited by that noise.
    """
    x = as_tensor(paths, "paths", (2, 3), "(T, d) or (n, T, d)").double()
    x = x[None] if x.ndim == 2 else x
    check_real(dt, "dt", above=0.0)
    check_positive_int(folds, "folds", 2)
    check_positive_int(num_blocks, "num_blocks", 2 * folds)
    if not isinstance(lags, tuple | list) or not 1 <= len(lags) <= 2:
        raise InvalidInputError("lags must be one or two numbers of steps", got=repr(lags)[:40])
    for lag in lags:
        check_positive_int(lag, "lags")
    per_lag, errors, whole = {}, [], 0.0
    for lag in lags:
        currents = _currents(x, lag, features, num_blocks)
        mean, spread, time = currents[0], currents[1], currents[2] * float(dt)
        rate, error, inside = _cross_fit(mean, spread, time, folds)
        per_lag[int(lag)] = rate
        errors.append(error)
        whole = inside if lag == lags[0] else whole
    values = list(per_lag.values())
    if len(values) == 1:
        return ShortTimeEntropy(values[0], errors[0], per_lag, whole)
    first, second = (float(k) for k in per_lag)
    weight = second / (second - first)
    rate = weight * values[0] + (1 - weight) * values[1]
    return ShortTimeEntropy(rate, errors[0] * max(1.0, abs(weight) ** 0.5), per_lag, whole)


def _currents(x: Tensor, lag: int, features: Any, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of currents ``(B, K)``, of their products ``(B, K, K)``, and numbers of steps ``(B,)`` by block."""
    thin = x[:, ::lag]
    step, middle = thin[:, 1:] - thin[:, :-1], 0.5 * (thin[:, 1:] + thin[:, :-1])
    if features == "linear":
        centred = middle - middle.mean((0, 1))
        products = (centred[..., :, None] * step[..., None, :]).flatten(-2)
        currents = torch.cat([products, step], -1)
    elif callable(features):
        currents = (features(middle) * step[..., None, :]).sum(-1)
    else:
        raise InvalidInputError(
            "features is unknown", got=repr(features)[:40], expected="'linear' or a function"
        )
    flat = currents.reshape(-1, currents.shape[-1])
    flat = flat / flat.std(0).clamp(min=1e-300)
    size = len(flat) // num_blocks
    if size < 2:
        raise ShapeError(
            "the trajectories are too short for so many blocks",
            got=len(flat),
            expected=f">= {2 * num_blocks}",
        )
    blocks = flat[: size * num_blocks].reshape(num_blocks, size, -1)
    counts = torch.full((num_blocks,), float(size * lag), dtype=torch.float64)
    return blocks.sum(1), blocks.mT @ blocks, counts


def _cross_fit(total: Tensor, products: Tensor, time: Tensor, folds: int) -> tuple[float, float, float]:
    """Return the cross-fitted rate, its standard error over blocks, and the rate in sample."""
    m, g = total.sum(0) / time.sum(), products.sum(0) / time.sum()
    ridge = 1e-10 * torch.eye(len(m), dtype=m.dtype) * g.diagonal().mean()
    inside = float(2 * m @ torch.linalg.solve(g + ridge, m))
    values = []
    fold = torch.arange(len(time)) % folds
    for k in range(folds):
        here, there = fold == k, fold != k
        other = total[there].sum(0) / time[there].sum()
        matrix = products.sum(0) / time.sum() + ridge
        coefficients = torch.linalg.solve(matrix, other)
        values.append(2 * (total[here] / time[here, None]) @ coefficients)
    per_block = torch.cat(values)
    return float(per_block.mean()), float(per_block.std() / len(per_block) ** 0.5), inside
