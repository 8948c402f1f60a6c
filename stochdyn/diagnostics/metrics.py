"""Distances between samples and scores of predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_bool,
    check_event_size,
    check_nonempty,
    check_real,
    check_same_device,
)
from stochdyn.core._distance import distance_between
from stochdyn.core.law.path import Estimate
from stochdyn.errors import (
    ConvergenceWarning,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TooFewDrawsError,
)

__all__ = [
    "crps",
    "emd",
    "energy_distance",
    "interval_coverage",
    "mmd",
    "negative_log_predictive_density",
    "psnr",
    "rmse",
]

# Whatever becomes a tensor: lists, NumPy, pandas, xarray, torch.
Values = Any


def emd(
    x: Values, y: Values, p: float = 2, weights_x: Values | None = None, weights_y: Values | None = None
) -> float:
    r"""Return the exact optimal transport distance between two samples, solved as a linear programme.

    .. math:: W_p(x,y)=\Big(\min_{\pi\in\Pi(a,b)}\sum_{ij}\pi_{ij}\,|x_i-y_j|^p\Big)^{1/p}

    with the Euclidean distance; in one dimension by sorting.

    Args:
        x: The points ``(n, d)``, or ``(n,)`` for points on the line.
        y: The points of the second sample, ``(m, d)`` or ``(m,)``.
        p: The order, at least 1.
        weights_x: The non-negative weights ``(n,)`` of the first sample, made to sum to 1; equal if None.
        weights_y: The weights of the second sample, ``(m,)``.

    Returns:
        The distance, in the units of ``x``.

    Raises:
        EmptyDataError: If a sample is empty.
        NonFiniteError: If a point or a weight isn't finite.
        ShapeError: If dimensions differ, or weights don't fit.
        InvalidInputError: If ``p < 1`` or a weight is negative.

    Example:
        >>> emd(torch.zeros(5, 2), torch.ones(3, 2))  # doctest: +ELLIPSIS
        1.414213...

    Reference:
        Peyré and Cuturi, "Computational optimal transport", 2019, equation 2.15; Flamary et al., "POT", 2021.
    """
    check_real(p, "p", minimum=1.0)
    x, y = (points.detach() for points in _samples(x, y))
    a, b = _weights(weights_x, x, "weights_x"), _weights(weights_y, y, "weights_y")
    import ot

    if x.shape[1] == 1:
        # On the line the optimal plan is that of the sorted points; in units of the largest distance nothing overflows.
        origin = torch.cat([x, y]).mean()
        line_x, line_y = x[:, 0] - origin, y[:, 0] - origin
        unit = float(torch.cat([line_x, line_y]).abs().max())
        if unit == 0.0:
            return 0.0
        cost = ot.emd2_1d((line_x / unit).numpy(), (line_y / unit).numpy(), a, b, metric="minkowski", p=p)
        return unit * float(max(cost, 0.0) ** (1 / p))
    distance = distance_between(x, y).numpy()
    # In units of the largest distance: the solver has tolerances of its own, and powers would overflow.
    unit = float(distance.max())
    if unit == 0.0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT's own warning says the same with less
        cost, log = ot.emd2(a, b, (distance / unit) ** p, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        warnings.warn(
            f"The transport problem wasn't solved to the end: {log['warning']}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return unit * max(float(cost), 0.0) ** (1 / p)


def energy_distance(x: Values, y: Values) -> Tensor:
    r"""Return the energy distance between two samples, zero only if their laws agree.

    .. math:: D^2=2\,E|X-Y|-E|X-X'|-E|Y-Y'|

    over all pairs, a point with itself included, so that :math:`D^2\ge0`.

    Args:
        x: The points of the first sample, ``(n, d)`` or ``(n,)``.
        y: The points of the second sample, ``(m, d)`` or ``(m,)``.

    Returns:
        Scalar ``D``, in double precision, differentiable where it isn't zero.

    Raises:
        EmptyDataError, NonFiniteError, ShapeError: As :func:`emd`.

    Example:
        >>> energy_distance(torch.zeros(4), torch.ones(4))
        tensor(1.4142, dtype=torch.float64)

    Reference:
        Székely and Rizzo, "Energy statistics", 2013, equation 5.
    """
    x, y = _samples(x, y)
    squared = 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)
    return squared.clamp(min=0).sqrt()


def mmd(x: Values, y: Values, bandwidth: float | None = None) -> Tensor:
    r"""Return the maximum mean discrepancy of two samples under a Gaussian kernel.

    .. math:: \mathrm{MMD}^2=E\,k(X,X')+E\,k(Y,Y')-2\,E\,k(X,Y),\qquad k(x,y)=e^{-|x-y|^2/(2h^2)}

    over all pairs, a point with itself included.

    Args:
        x: The points of the first sample, ``(n, d)`` or ``(n,)``.
        y: The points of the second sample, ``(m, d)`` or ``(m,)``.
        bandwidth: The bandwidth ``h``; the median distance within the joined sample if None.

    Returns:
        Scalar, in double precision; differentiable in the points where it isn't zero, the bandwidth held.

    Raises:
        EmptyDataError, NonFiniteError, ShapeError: As :func:`emd`.
        InvalidInputError: If the bandwidth isn't positive.

    Example:
        >>> mmd(torch.zeros(1), torch.ones(1), bandwidth=1.0)
        tensor(0.8871, dtype=torch.float64)

    Reference:
        Gretton et al., "A kernel two-sample test", 2012, equation 5.
    """
    x, y = _samples(x, y)
    if bandwidth is None:
        joined = torch.cat([x, y]).detach()[:: max(1, (x.shape[0] + y.shape[0]) // 2000)]
        distances = torch.pdist(joined)
        positive = distances[distances > 0]
        if not positive.numel():
            return joined.new_zeros(())  # all points are one
        # The median of all distances, unless most points coincide.
        bandwidth = float(distances.median()) or float(positive.median())
    check_real(bandwidth, "bandwidth", above=0.0)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        # Divided before it is squared, so that no unit of length over- or underflows.
        return _mean_over_pairs(u, v, lambda r: torch.exp(-0.5 * (r / bandwidth) ** 2))

    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).clamp(min=0).sqrt()


def crps(draws: Values, value: Values, *, fair: bool = True) -> Tensor:
    r"""Return the continuous ranked probability score of draws, the smaller the better.

    .. math:: \mathrm{CRPS}(F,y)=E|X-y|-\tfrac12E|X-X'|,\qquad X,X'\sim F.

    Args:
        draws: The draws ``(S, ...)`` from the predictive law.
        value: The observed value ``(...)``.
        fair: Whether to take the second mean over pairs of distinct draws, which makes the score unbiased for
            the law they come from; else it is the score of the draws' own empirical law.

    Returns:
        ``(...)``, in the units of ``value``.

    Raises:
        TooFewDrawsError: If there are fewer than two draws.
        ShapeError: If ``draws`` isn't ``(S, *value.shape)``.
        NonFiniteError: If a draw or value isn't finite.

    Example:
        >>> crps(torch.tensor([0.0, 2.0]), torch.tensor(1.0), fair=False)
        tensor(0.5000)

    Reference:
        Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, equation 21;
        Ferro, "Fair scores for ensemble forecasts", 2014.
    """
    check_bool(fair, "fair")
    draws, value = _draws(draws, value, minimum=2)
    size = draws.shape[0]
    ordered = draws.sort(0).values
    # E|X - y| - E|X - X'| / 2, the second mean by order statistics: sum_i (2i - n - 1) x_(i) over n (n - 1) pairs, or n^2.
    rank = torch.arange(1, size + 1, dtype=draws.dtype, device=draws.device).reshape(-1, *(1,) * value.ndim)
    spread = ((2 * rank - size - 1) * ordered).sum(0) / (size * (size - 1 if fair else size))
    return (draws - value).abs().mean(0) - spread


def interval_coverage(draws: Values, value: Values, level: float = 0.9) -> Estimate:
    """Return how often central intervals of draws contain the observed value.

    Args:
        draws: The draws ``(S, ...)``.
        value: The observed value ``(...)``.
        level: The probability of the interval, in (0, 1).

    Returns:
        The fraction of entries inside and its binomial standard error at the nominal level, which holds if
        entries are independent of each other.

    Raises:
        TooFewDrawsError: If there are fewer draws than two per tail.
        ShapeError: If ``draws`` isn't ``(S, *value.shape)``.
        NonFiniteError: If a draw or value isn't finite.
        InvalidInputError: If the level isn't inside (0, 1).

    Example:
        >>> draws = torch.linspace(0, 1, 101)[:, None].expand(101, 4)
        >>> interval_coverage(draws, torch.tensor([0.5, 0.1, 0.7, 2.0])).mean
        tensor(0.7500)
    """
    check_real(level, "level", above=0.0, below=1.0)
    draws, value = _draws(draws, value, minimum=math.ceil(4 / (1 - level) - 1e-9))
    # Torch's quantiles aren't made for half precision.
    draws = draws.to(torch.promote_types(draws.dtype, torch.float32))
    edges = draws.new_tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = torch.quantile(draws, edges, dim=0)
    inside = ((value >= low) & (value <= high)).to(draws.dtype)
    stderr = math.sqrt(level * (1 - level) / value.numel())
    return Estimate(inside.mean(), draws.new_tensor(stderr))


def negative_log_predictive_density(log_likelihood: Values, log_weights: Values | None = None) -> Tensor:
    r"""Return the negative log predictive density of each observation.

    .. math:: -\log\sum_s\bar w_s\,p(y_i\mid z_s)

    Args:
        log_likelihood: The log likelihood ``(S, ...)``, pointwise, of held-out data at each draw.
        log_weights: The importance weights ``(S,)`` of the draws; equal if None.

    Returns:
        ``(...)`` in nats.

    Raises:
        EmptyDataError: If there are no draws.
        ShapeError: If there isn't one weight per draw.
        NonFiniteError: If a log likelihood is NaN; minus infinity is one that rules a draw out.

    Example:
        >>> negative_log_predictive_density(torch.log(torch.tensor([[0.2], [0.4]])))
        tensor([1.2040])

    Reference:
        Gelman et al., "Bayesian data analysis", 2013, equation 7.4.
    """
    log_likelihood = as_tensor(log_likelihood, "log_likelihood", finite=False)
    check_nonempty(log_likelihood, "log_likelihood")
    if bool(torch.isnan(log_likelihood).any()):
        raise NonFiniteError("log_likelihood holds NaN", hint="leave out observations that are missing")
    if log_likelihood.ndim == 0:
        raise ShapeError("log_likelihood needs an axis of draws", got="a single number")
    size = log_likelihood.shape[0]
    if log_weights is None:
        return math.log(size) - log_likelihood.logsumexp(0)
    log_weights = as_tensor(log_weights, "log_weights", finite=False)
    if tuple(log_weights.shape) != (size,):
        raise ShapeError(
            "log_weights need one entry per draw", got=f"shape {tuple(log_weights.shape)}", expected=(size,)
        )
    # log sum_s w_s p(y | z_s) with weights that sum to one.
    normalised = torch.log_softmax(log_weights.to(log_likelihood.dtype), 0)
    return -(log_likelihood + normalised.reshape(-1, *(1,) * (log_likelihood.ndim - 1))).logsumexp(0)


def rmse(prediction: Values, target: Values, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the root mean squared error.

    Args:
        prediction: The predicted values, of any shape.
        target: Values of the same shape, to which the prediction is compared.
        dim: The axes to average over; all if None.

    Returns:
        The error, in the units of ``target``.

    Raises:
        EmptyDataError, ShapeError, NonFiniteError: For empty, unequal or non-finite input.

    Example:
        >>> rmse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(1.4142)
    """
    prediction, target = _pair(prediction, target)
    axes = _axes(dim, prediction.ndim)
    count = prediction.numel() / max(prediction.sum(axes).numel(), 1)
    # The norm scales before it squares, so that no unit over- or underflows.
    return torch.linalg.vector_norm(prediction - target, dim=axes) / count**0.5


def psnr(
    prediction: Values, target: Values, data_range: float, dim: int | tuple[int, ...] | None = None
) -> Tensor:
    r"""Return the peak signal-to-noise ratio in decibels.

    .. math:: 20\log_{10}(\mathtt{data\_range}/\mathrm{rmse})

    Args:
        prediction: The predicted values, of any shape.
        target: Values of the same shape, to which the prediction is compared.
        data_range: The distance between the least and the largest value that is possible, 1 for images in [0, 1].
        dim: The axes to average the squared error over; all if None.

    Returns:
        Decibels; infinite if there is no error.

    Raises:
        EmptyDataError, ShapeError, NonFiniteError: As :func:`rmse`.
        InvalidInputError: If ``data_range`` isn't positive.

    Example:
        >>> psnr(torch.full((4,), 0.1), torch.zeros(4), data_range=1.0)
        tensor(20.)
    """
    check_real(data_range, "data_range", above=0.0)
    return 20 * torch.log10(data_range / rmse(prediction, target, dim))


def _samples(x: Values, y: Values) -> tuple[Tensor, Tensor]:
    pair = []
    for value, name in ((x, "x"), (y, "y")):
        points = as_tensor(value, name, (1, 2), "(points, dim) or (points,)").double().cpu()
        check_nonempty(points, name)
        pair.append(points[:, None] if points.ndim == 1 else points)
    check_event_size(pair[1], pair[0].shape[1], "y")
    return pair[0], pair[1]


def _weights(weights: Values | None, points: Tensor, name: str) -> np.ndarray:
    size = points.shape[0]
    if weights is None:
        return np.full(size, 1 / size)
    w = as_tensor(weights, name).detach().double().cpu()
    if tuple(w.shape) != (size,):
        raise ShapeError(f"{name} needs one entry per point", got=f"shape {tuple(w.shape)}", expected=(size,))
    if bool((w < 0).any()) or not bool(w.sum() > 0):
        raise InvalidInputError(
            f"{name} must be non-negative with a positive sum", got=f"minimum {w.min().item():g}"
        )
    return (w / w.sum()).numpy()


def _mean_distance(x: Tensor, y: Tensor) -> Tensor:
    return _mean_over_pairs(x, y, lambda r: r)


def _mean_over_pairs(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    total = x.new_zeros(())
    for rows in x.split(max(1, 2**22 // y.shape[0])):  # bounds the memory of the distances
        total = total + function(distance_between(rows, y)).sum()
    return total / (x.shape[0] * y.shape[0])


def _draws(draws: object, value: object, minimum: int) -> tuple[Tensor, Tensor]:
    """Return draws and an observed value as tensors that fit each other."""
    draws = as_tensor(draws, "draws")
    value = as_tensor(value, "value", like=draws)
    check_nonempty(value, "value")
    if draws.ndim != value.ndim + 1 or draws.shape[1:] != value.shape:
        raise ShapeError(
            "draws must have one more axis than value, in front",
            got=f"draws {tuple(draws.shape)}, value {tuple(value.shape)}",
        )
    if draws.shape[0] < minimum:
        raise TooFewDrawsError("too few draws", got=draws.shape[0], expected=f"at least {minimum}")
    check_same_device(draws=draws, value=value)
    return draws, value


def _axes(dim: object, ndim: int) -> tuple[int, ...]:
    """Return which axes are averaged over."""
    if dim is None:
        return tuple(range(ndim))
    chosen = dim if isinstance(dim, tuple | list) else (dim,)
    if not all(isinstance(d, int) and not isinstance(d, bool) and -ndim <= d < ndim for d in chosen):
        raise InvalidInputError(
            "dim must name axes", got=repr(dim)[:60], expected=f"integers from {-ndim} to {ndim - 1}"
        )
    return tuple(chosen)


def _pair(prediction: object, target: object) -> tuple[Tensor, Tensor]:
    """Return a prediction and its target as tensors of one shape."""
    prediction = as_tensor(prediction, "prediction")
    target = as_tensor(target, "target", like=prediction)
    check_nonempty(prediction, "prediction")
    if prediction.shape != target.shape:
        raise ShapeError(
            "prediction and target differ in shape",
            got=f"{tuple(prediction.shape)} and {tuple(target.shape)}",
        )
    return prediction, target
