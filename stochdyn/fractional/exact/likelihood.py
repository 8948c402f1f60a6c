"""The exact likelihood of fractional Gaussian noise, tabulated in the Hurst index for one series."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_hurst, check_no_gradient, check_nonempty, check_positive
from stochdyn._transforms import as_leaf, ordinarily, recording
from stochdyn.errors import ApproximationWarning, ConvergenceWarning, InvalidInputError, TooFewDrawsError
from stochdyn.fractional.exact.fbm import fgn_autocovariance
from stochdyn.fractional.exact.prediction import prediction_errors

__all__ = ["HURST_LIMITS", "FGNFit", "HurstLikelihood", "fit_fgn", "hurst_log_likelihood"]

HURST_LIMITS = (1e-4, 1 - 1e-4)
_NODES, _FEW_NODES = (96, 192, 384), (12, 24, 48, 96)
_NARROW = 1.5  # half width in the logit below which few nodes are tried first
_SHORT = 200  # below that many values the range isn't narrowed
_RANGE_DROP = 12.0  # nats below the peak of the likelihood
_TOLERANCE = 1e-8
_MIN_LENGTH = 8


def _innovations(series: np.ndarray, hurst: np.ndarray) -> np.ndarray:
    """Return ``(3, M, n)``: one-step prediction errors of the series and of the constant 1, and log variances, for unit noise."""
    r = fgn_autocovariance(series.shape[0], torch.from_numpy(hurst)).numpy()
    errors, log_variance = prediction_errors(np.stack([series, np.ones_like(series)]), r)
    deviation = np.exp(0.5 * log_variance)
    return np.stack([errors[:, 0] * deviation, errors[:, 1] * deviation, log_variance])


class HurstLikelihood:
    r"""Exact log likelihood of a series under fractional Gaussian noise, at the cost of an interpolation.

    With :math:`R_H` the correlation matrix, the density of :math:`y\sim N(\mu1,\sigma^2\Delta^{2H}R_H)`
    depends on the data through four functions of H alone,

    .. math::
        \log\det R_H,\quad p=1^\top R_H^{-1}1,\quad \hat\mu=1^\top R_H^{-1}y/p,\quad
        q=(y-\hat\mu)^\top R_H^{-1}(y-\hat\mu).

    They are computed once at Chebyshev nodes in :math:`\operatorname{logit}H` by the Durbin-Levinson
    recursion, :math:`O(n^2)` each, and interpolated as logarithms; at indices between the nodes the log likelihood
    is compared with the exact one, and the nodes doubled until they agree within 1e-8 (relative to 1 nat plus
    the distance from the peak). Take it for a model of your own around one series, in Pyro say;
    :func:`~stochdyn.fractional.infer_hurst` needs no such table.

    Args:
        series: The stationary increments ``(n,)``: finite, not constant, at least 8 values.
        dt: The time between the ends of an increment.
        limits: The Hurst indices between which the table holds; a narrow range takes few nodes.

    Attributes:
        series: The data in float64.
        dt, limits: The time step and the range of indices, as given.
        num_nodes: The number of Chebyshev nodes used.
        error: The largest deviation found of the interpolated profile log likelihood, in those units.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError: For a series that is empty, short, not
            finite or has more than one axis.
        InvalidInputError: For a constant series.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> table = HurstLikelihood(nile_minima().level)
        >>> round(float(table(0.8315, 1149.88, 89.14)), 3)
        -3757.463

    Reference:
        J. Beran, Statistics for long-memory processes, Chapman & Hall 1994, chapter 5.
    """

    def __init__(self, series: Any, dt: float = 1.0, limits: tuple[float, float] = HURST_LIMITS) -> None:
        self.series = _read_series(series)
        check_positive(dt, "dt")
        self.dt = float(dt)
        low, high = (float(h) for h in limits)
        if not HURST_LIMITS[0] <= low < high <= HURST_LIMITS[1]:
            raise InvalidInputError(
                "limits must increase",
                got=limits,
                expected=f"within {HURST_LIMITS[0]:g} and {HURST_LIMITS[1]:g}",
            )
        self.limits = (low, high)
        ends = math.log(low / (1 - low)), math.log(high / (1 - high))
        self._middle, self._half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        self._center = float(self.series.mean())
        self._spread = float(self.series.std())
        standard = ((self.series - self._center) / self._spread).numpy()
        narrow = self._half < _NARROW
        probe = 1 / (1 + np.exp(-self._middle - np.linspace(-0.97, 0.93, 3 if narrow else 11) * self._half))
        exact = self._profile_of(torch.from_numpy(_summaries(_innovations(standard, probe))))
        for nodes in _FEW_NODES if narrow else _NODES:
            self._tabulate(standard, nodes)
            found = self._profile_of(self._summaries_at(torch.from_numpy(probe)))
            # where the likelihood is thousands of nats below its peak, rounding near H = 1 is no concern
            self.error = float(((found - exact).abs() / (1 + exact.max() - exact)).max())
            if self.error < _TOLERANCE:
                break
        else:
            warnings.warn(
                f"the interpolated log likelihood is off by {self.error:.1e} nats",
                ApproximationWarning,
                stacklevel=2,
            )

    def _tabulate(self, standard: np.ndarray, nodes: int) -> None:
        angle = (np.arange(nodes) + 0.5) * np.pi / nodes
        hurst = 1 / (1 + np.exp(-self._middle - np.cos(angle) * self._half))
        self._nodal = _innovations(standard, hurst)
        # discrete cosine transform: values at nodes to Chebyshev coefficients
        order = np.arange(nodes)
        self._transform = np.cos(order[:, None] * angle) * 2 / nodes
        self._transform[0] /= 2
        self._coefficients = torch.from_numpy(self._transform @ _summaries(self._nodal))
        self.num_nodes = nodes

    def _chebyshev(self, hurst: Tensor) -> Tensor:
        """Chebyshev polynomials at logit(hurst), ``(..., M)``."""
        x = (torch.logit(hurst.to(torch.float64)) - self._middle) / self._half
        x = x.clamp(-1 + 1e-12, 1 - 1e-12)
        return torch.cos(torch.arange(self.num_nodes, dtype=torch.float64) * torch.acos(x)[..., None])

    def _summaries_at(self, hurst: Tensor) -> Tensor:
        """``(..., 4)``: log det, log p, mu-hat and log q, of the standardised series."""
        return self._chebyshev(hurst) @ self._coefficients

    def __call__(self, hurst: Tensor | float, mean: Tensor | float, scale: Tensor | float) -> Tensor:
        r"""Return the log density of the series, differentiable in all arguments.

        Args:
            hurst: Hurst index, ``(*batch)``, within :attr:`limits`.
            mean: The expectation of one increment, ``(*batch)``.
            scale: The standard deviation of an increment over unit time; over ``dt``, times ``dt ** hurst``.
        """
        check_hurst(hurst)
        h, m, s = (torch.as_tensor(v, dtype=torch.float64) for v in (hurst, mean, scale))
        log_det, log_p, mu, log_q = self._summaries_at(h).unbind(-1)
        log_sd = torch.log(s) + h * math.log(self.dt)
        inverse = torch.exp(-2 * log_sd) * self._spread**2
        shift = (m - self._center) / self._spread - mu
        quadratic = inverse * (torch.exp(log_q) + torch.exp(log_p) * shift**2)
        n = self.series.shape[0]
        return -0.5 * (n * math.log(2 * math.pi) + 2 * n * log_sd + log_det + quadratic)

    def profile(self, hurst: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log likelihood maximised over mean and scale, and the maximising mean and scale."""
        check_hurst(hurst)
        h = torch.as_tensor(hurst, dtype=torch.float64)
        summaries = self._summaries_at(h)
        sd = self._spread * torch.exp(0.5 * (summaries[..., 3] - math.log(self.series.shape[0])))
        mean = summaries[..., 2] * self._spread + self._center
        return self._profile_of(summaries), mean, sd * self.dt ** (-h)

    def conditional(self, hurst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, given the Hurst index, the best scale and mean, and the mean's deviation per scale."""
        h = hurst.to(torch.float64)
        _, log_p, mu, log_q = self._summaries_at(h).unbind(-1)
        shrink = torch.exp(-h * math.log(self.dt))
        scale = self._spread * shrink * torch.exp(0.5 * (log_q - math.log(self.series.shape[0])))
        return scale, mu * self._spread + self._center, torch.exp(-0.5 * log_p) / shrink

    def _profile_of(self, summaries: Tensor) -> Tensor:
        log_det, _, _, log_q = summaries.unbind(-1)
        n = self.series.shape[0]
        log_variance = 2 * math.log(self._spread) + log_q - math.log(n)
        return -0.5 * (n * (math.log(2 * math.pi) + log_variance + 1) + log_det)

    def pointwise(self, hurst: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Return the log density of each value given those before it, ``(*batch, n)``; they add up."""
        h, m, s = (v.detach().to(torch.float64) for v in (hurst, mean, scale))
        at_nodes = self._chebyshev(h) @ torch.from_numpy(self._transform)
        data, one, log_variance = (at_nodes @ torch.from_numpy(table) for table in self._nodal)
        log_variance = log_variance + 2 * (torch.log(s) + h * math.log(self.dt))[..., None]
        error = data * self._spread - one * (m[..., None] - self._center)
        return -0.5 * (math.log(2 * math.pi) + log_variance + error**2 * torch.exp(-log_variance))


def _summaries(innovations: np.ndarray) -> np.ndarray:
    """``(M, 4)``: log det, log p, mu-hat, log q."""
    data, one, log_variance = innovations
    # With whitened data and ones: p = 1'R^-1 1, mu = 1'R^-1 y / p, q = (y - mu)'R^-1 (y - mu).
    precision = np.exp(-log_variance)
    p = (one**2 * precision).sum(-1)
    mu = (one * data * precision).sum(-1) / p
    q = ((data - mu[:, None] * one) ** 2 * precision).sum(-1)
    return np.stack([log_variance.sum(-1), np.log(p), mu, np.log(q)], axis=-1)


def _read_series(series: Any) -> Tensor:
    value = as_tensor(series, "series", 1, "(n,)", like=torch.zeros((), dtype=torch.float64)).detach()
    check_nonempty(value, "series")
    value = value.to("cpu", torch.float64)
    if value.shape[0] < _MIN_LENGTH:
        raise TooFewDrawsError(
            "series is too short", got=f"{value.shape[0]} values", expected=f"at least {_MIN_LENGTH}"
        )
    if float(value.std()) <= 1e-12 * float(value.abs().max()):
        raise InvalidInputError(
            "series is constant",
            got=f"{value[0].item():g} throughout",
            hint="the Hurst index needs variation",
        )
    return value


@dataclass(frozen=True)
class FGNFit:
    """Exact maximum-likelihood fit of fractional Gaussian noise.

    Attributes:
        hurst: The estimate of the Hurst index.
        stderr: The standard error of the index, by the curvature of the profile log likelihood.
        mean: The expectation of one increment.
        scale: The standard deviation of an increment over unit time.
        log_likelihood: The log likelihood at the maximum.
    """

    hurst: float
    stderr: float
    mean: float
    scale: float
    log_likelihood: float


def hurst_log_likelihood(hurst: Tensor | float, series: Any, dt: float = 1.0) -> Tensor:
    """Return the exact profile log likelihood of the Hurst index: maximised over mean and scale.

    Args:
        hurst: The Hurst indices ``(*batch)``, in (0, 1); not differentiable, for which :class:`HurstLikelihood` is there.
        series: The stationary increments ``(n,)``.
        dt: The time between the ends of an increment.

    Returns:
        ``(*batch)`` in float64, at :math:`O(n^2)` for each index.

    Raises:
        HurstRangeError: For an index outside (0, 1).
        InvalidInputError: If the series is constant or too short, as for :class:`HurstLikelihood`; or a gradient is wanted.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> round(float(hurst_log_likelihood(0.5, nile_minima().level)), 2)
        -3914.34
    """
    check_hurst(hurst)
    check_no_gradient(hurst, "hurst", "this likelihood", "take HurstLikelihood(series).profile(hurst)[0]")
    check_positive(dt, "dt")  # a factor of the scale, over which the likelihood is maximised
    data = _read_series(series)
    h = torch.as_tensor(hurst, dtype=torch.float64).detach().cpu()
    center, spread, n = float(data.mean()), float(data.std()), data.shape[0]
    found = _summaries(_innovations(((data - center) / spread).numpy(), h.reshape(-1).numpy()))
    log_variance = 2 * math.log(spread) + found[:, 3] - math.log(n)
    value = -0.5 * (n * (math.log(2 * math.pi) + log_variance + 1) + found[:, 0])
    return torch.from_numpy(value).reshape(h.shape)


@ordinarily
def fit_fgn(series: Any, dt: float = 1.0) -> FGNFit:
    """Return the exact maximum-likelihood fit of fractional Gaussian noise to a series.

    Take it for a point estimate; :func:`~stochdyn.fractional.infer_hurst` gives the posterior and tests the fit.

    Args:
        series: The stationary increments ``(n,)``.
        dt: The time between the ends of an increment.

    Returns:
        The fit, with the standard error of the Hurst index.

    Raises:
        InvalidInputError: If the series is constant or too short, as for :class:`HurstLikelihood`.

    Warns:
        ConvergenceWarning: If the likelihood still rises at the end of the range, so that there is no standard error.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> fit = fit_fgn(nile_minima().level)
        >>> round(fit.hurst, 4), round(fit.stderr, 4), round(fit.mean, 2), round(fit.scale, 2)
        (0.8315, 0.0246, 1149.88, 89.14)
    """
    data = _read_series(series)
    check_positive(dt, "dt")
    fit = maximise(HurstLikelihood(data, dt, _likely_range(data.numpy())))
    if not math.isfinite(fit.stderr):
        warnings.warn(
            f"the likelihood of the Hurst index rises up to the end of its range, {fit.hurst:.4g}: "
            "increments where a path was meant, differences taken too often, or a path where increments were meant",
            ConvergenceWarning,
            stacklevel=2,
        )
    return fit


def _likely_range(series: np.ndarray) -> tuple[float, float]:
    """Return a range that has the peak of the likelihood inside: by that of the periodogram, for series that aren't short."""
    n = len(series)
    if n < _SHORT:
        return HURST_LIMITS
    grid = np.concatenate([[1e-3], np.linspace(0.01, 0.99, 99), [0.999]])
    intensity = np.abs(np.fft.rfft(series - series.mean())[1:]) ** 2 / n
    rows = fgn_autocovariance(n, torch.from_numpy(grid)).numpy() * (1 - np.arange(n) / n)
    # the expectation of the periodogram: lags k and k - n fall on the same frequency
    folded = np.concatenate([rows[:, :1], rows[:, 1:] + rows[:, :0:-1]], axis=1)
    density = np.fft.rfft(folded).real[:, 1:].clip(1e-300)
    value = -0.5 * (2 * np.log(density).sum(1) + n * np.log((intensity / density).sum(1)))
    near = np.flatnonzero(value > value.max() - _RANGE_DROP)
    low, high = grid[max(near[0] - 1, 0)], grid[min(near[-1] + 1, len(grid) - 1)]
    return (HURST_LIMITS[0] if near[0] == 0 else float(low)), (
        HURST_LIMITS[1] if near[-1] == len(grid) - 1 else float(high)
    )


def maximise(table: HurstLikelihood) -> FGNFit:
    """Maximise a tabulated likelihood: a grid over logit(H), then Newton's method on the profile."""
    half = table._half * (1 - 1e-7)
    ends = table._middle - half, table._middle + half
    grid = torch.sigmoid(torch.linspace(*ends, 400, dtype=torch.float64))
    z = torch.logit(grid[table.profile(grid)[0].argmax()]).clone()
    width = 2 * half / 399
    low, high = z - width, z + width
    for _ in range(50):
        slope, curvature = _derivatives(table, z)
        step = -slope / curvature if curvature < 0 else torch.sign(slope) * width / 4
        moved = torch.clamp(z + step, low, high).clamp(*ends)
        if bool((moved - z).abs() < 1e-12):
            break
        z = moved
    hurst = torch.sigmoid(z)
    _, curvature = _derivatives(table, z)
    spread = (-1 / curvature).sqrt() if curvature < 0 else torch.tensor(math.inf)
    value, mean, scale = table.profile(hurst)
    stderr = float(spread * hurst * (1 - hurst))
    return FGNFit(float(hurst), stderr, float(mean), float(scale), float(value))


def _derivatives(table: HurstLikelihood, z: Tensor) -> tuple[Tensor, Tensor]:
    with recording():
        z = as_leaf(z)
        value = table.profile(torch.sigmoid(z))[0]
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, z)
    return slope.detach(), curvature
