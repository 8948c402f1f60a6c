"""The exact likelihood of fractional Gaussian noise, tabulated in the Hurst index for one series."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_finite, check_hurst, check_ndim, check_nonempty, check_positive
from stochdyn.errors import ApproximationWarning, InvalidInputError, TooFewDrawsError
from stochdyn.fractional.exact.fbm import fgn_autocovariance

__all__ = ["HURST_LIMITS", "FGNFit", "HurstLikelihood", "fit_fgn", "hurst_log_likelihood"]

HURST_LIMITS = (1e-4, 1 - 1e-4)
_LOGIT_LIMIT = math.log(HURST_LIMITS[1] / HURST_LIMITS[0])
_NODES = (96, 192, 384)
_TOLERANCE = 1e-8
_MIN_LENGTH = 8


def _innovations(series: np.ndarray, hurst: np.ndarray) -> np.ndarray:
    """Durbin-Levinson for many Hurst indices at once.

    Args:
        series: ``(n,)``.
        hurst: ``(M,)``.

    Returns:
        ``(3, M, n)``: one-step prediction errors of the series and of the constant 1, and the logarithms of
        their variances, for noise of unit variance.
    """
    n = series.shape[0]
    r = fgn_autocovariance(n, torch.from_numpy(hurst)).numpy()
    out = np.empty((3, hurst.shape[0], n))
    out[0, :, 0], out[1, :, 0], out[2, :, 0] = series[0], 1.0, 0.0
    phi = np.zeros_like(r)
    variance = np.ones(hurst.shape[0])
    backwards, lags = series[::-1].copy(), r[:, ::-1].copy()
    for k in range(1, n):
        known = phi[:, : k - 1]
        # r(k-1) ... r(1) beside phi_1 ... phi_(k-1)
        partial = (r[:, k] - np.einsum("mj,mj->m", known, lags[:, n - k : n - 1])) / variance
        phi[:, : k - 1] = known - partial[:, None] * known[:, ::-1]
        phi[:, k - 1] = partial
        variance = variance * (1 - partial**2)
        out[0, :, k] = series[k] - phi[:, :k] @ backwards[n - k :]
        out[1, :, k] = 1 - phi[:, :k].sum(-1)
        out[2, :, k] = np.log(variance)
    return out


class HurstLikelihood:
    r"""Exact log likelihood of a series under fractional Gaussian noise, at the cost of an interpolation.

    With :math:`R_H` the correlation matrix, the density of :math:`y\sim N(\mu1,\sigma^2\Delta^{2H}R_H)`
    depends on the data through four functions of H alone,

    .. math::
        \log\det R_H,\quad p=1^\top R_H^{-1}1,\quad \hat\mu=1^\top R_H^{-1}y/p,\quad
        q=(y-\hat\mu)^\top R_H^{-1}(y-\hat\mu).

    They are computed once at Chebyshev nodes in :math:`\operatorname{logit}H` by the Durbin-Levinson
    recursion, :math:`O(n^2)`, and interpolated as logarithms; at indices between the nodes the log likelihood
    is compared with the exact one, and the nodes doubled until they agree within 1e-8 (relative to 1 nat plus
    the distance from the peak).

    Args:
        series: ``(n,)`` finite, not constant, of at least 8 values: stationary increments.
        step: time between the ends of an increment.

    Attributes:
        series: the data in float64.
        step: as given.
        num_nodes: Chebyshev nodes used.
        error: largest deviation found of the interpolated profile log likelihood, in those units.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError: for a series that is empty, short, not
            finite or has more than one axis.
        InvalidInputError: for a constant series.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> table = HurstLikelihood(nile_minima().level)
        >>> round(float(table(0.8315, 1149.88, 89.14)), 3)
        -3757.463

    Reference:
        J. Beran, Statistics for long-memory processes, Chapman & Hall 1994, chapter 5.
    """

    def __init__(self, series: Tensor, step: float = 1.0) -> None:
        _check_series(series)
        check_positive(step, "step")
        self.series = series.detach().to("cpu", torch.float64)
        self.step = float(step)
        self._center = float(self.series.mean())
        self._spread = float(self.series.std())
        standard = ((self.series - self._center) / self._spread).numpy()
        probe = 1 / (1 + np.exp(-np.linspace(-0.97, 0.93, 11) * _LOGIT_LIMIT))
        exact = self._profile_of(torch.from_numpy(_summaries(_innovations(standard, probe))))
        for nodes in _NODES:
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
        hurst = 1 / (1 + np.exp(-np.cos(angle) * _LOGIT_LIMIT))
        self._nodal = _innovations(standard, hurst)
        # discrete cosine transform: values at nodes to Chebyshev coefficients
        order = np.arange(nodes)
        self._transform = np.cos(order[:, None] * angle) * 2 / nodes
        self._transform[0] /= 2
        self._coefficients = torch.from_numpy(self._transform @ _summaries(self._nodal))
        self.num_nodes = nodes

    def _chebyshev(self, hurst: Tensor) -> Tensor:
        """Chebyshev polynomials at logit(hurst), ``(..., M)``."""
        x = torch.logit(hurst.to(torch.float64)) / _LOGIT_LIMIT
        x = x.clamp(-1 + 1e-12, 1 - 1e-12)
        return torch.cos(torch.arange(self.num_nodes, dtype=torch.float64) * torch.acos(x)[..., None])

    def _summaries_at(self, hurst: Tensor) -> Tensor:
        """``(..., 4)``: log det, log p, mu-hat and log q, of the standardised series."""
        return self._chebyshev(hurst) @ self._coefficients

    def __call__(self, hurst: Tensor | float, mean: Tensor | float, scale: Tensor | float) -> Tensor:
        r"""Return the log density of the series, differentiable in all arguments.

        Args:
            hurst: Hurst index, ``(*batch)``, within [1e-4, 1 - 1e-4].
            mean: of one increment.
            scale: standard deviation of an increment over unit time; over ``step``, times ``step ** hurst``.
        """
        check_hurst(hurst)
        h, m, s = (torch.as_tensor(v, dtype=torch.float64) for v in (hurst, mean, scale))
        log_det, log_p, mu, log_q = self._summaries_at(h).unbind(-1)
        log_sd = torch.log(s) + h * math.log(self.step)
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
        return self._profile_of(summaries), mean, sd * self.step ** (-h)

    def conditional(self, hurst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, given the Hurst index, the best scale and mean, and the mean's deviation per scale."""
        h = hurst.to(torch.float64)
        _, log_p, mu, log_q = self._summaries_at(h).unbind(-1)
        shrink = torch.exp(-h * math.log(self.step))
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
        log_variance = log_variance + 2 * (torch.log(s) + h * math.log(self.step))[..., None]
        error = data * self._spread - one * (m[..., None] - self._center)
        return -0.5 * (math.log(2 * math.pi) + log_variance + error**2 * torch.exp(-log_variance))


def _summaries(innovations: np.ndarray) -> np.ndarray:
    """``(M, 4)``: log det, log p, mu-hat, log q."""
    data, one, log_variance = innovations
    precision = np.exp(-log_variance)
    p = (one**2 * precision).sum(-1)
    mu = (one * data * precision).sum(-1) / p
    q = ((data - mu[:, None] * one) ** 2 * precision).sum(-1)
    return np.stack([log_variance.sum(-1), np.log(p), mu, np.log(q)], axis=-1)


def _check_series(series: Any) -> None:
    if not isinstance(series, Tensor):
        got = type(series).__name__
        raise InvalidInputError("series must be a tensor", got=got, hint="use torch.as_tensor")
    check_nonempty(series, "series")
    check_ndim(series, 1, "series", "(n,)")
    if not series.is_floating_point():
        raise InvalidInputError("series must be floating", got=series.dtype, hint="use series.double()")
    check_finite(series, "series")
    if series.shape[0] < _MIN_LENGTH:
        raise TooFewDrawsError(
            "series is too short", got=f"{series.shape[0]} values", expected=f"at least {_MIN_LENGTH}"
        )
    spread = float(series.double().std())
    if spread <= 1e-12 * float(series.double().abs().max()):
        raise InvalidInputError(
            "series is constant",
            got=f"{series[0].item():g} throughout",
            hint="the Hurst index needs variation",
        )


@dataclass(frozen=True)
class FGNFit:
    """Exact maximum-likelihood fit of fractional Gaussian noise.

    Attributes:
        hurst: estimate; stderr: its standard error, by the curvature of the profile log likelihood.
        mean: of one increment; scale: standard deviation over unit time.
        log_likelihood: at the maximum.
    """

    hurst: float
    stderr: float
    mean: float
    scale: float
    log_likelihood: float


def hurst_log_likelihood(hurst: Tensor | float, series: Tensor, step: float = 1.0) -> Tensor:
    """Return the exact profile log likelihood of the Hurst index: maximised over mean and scale.

    Args:
        hurst: ``(*batch)``, in (0, 1); differentiable.
        series: ``(n,)`` stationary increments.
        step: time between the ends of an increment.

    Returns:
        ``(*batch)`` in float64.

    Raises:
        InvalidInputError: see :class:`HurstLikelihood`.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> round(float(hurst_log_likelihood(0.5, nile_minima().level)), 2)
        -3914.34
    """
    return HurstLikelihood(series, step).profile(hurst)[0]


def fit_fgn(series: Tensor, step: float = 1.0) -> FGNFit:
    """Return the exact maximum-likelihood fit of fractional Gaussian noise to a series.

    Args:
        series: ``(n,)`` stationary increments.
        step: time between the ends of an increment.

    Returns:
        The fit, with the standard error of the Hurst index.

    Raises:
        InvalidInputError: see :class:`HurstLikelihood`.

    Example:
        >>> from stochdyn.datasets import nile_minima
        >>> fit = fit_fgn(nile_minima().level)
        >>> round(fit.hurst, 4), round(fit.stderr, 4), round(fit.mean, 2), round(fit.scale, 2)
        (0.8315, 0.0246, 1149.88, 89.14)
    """
    return maximise(HurstLikelihood(series, step))


def maximise(table: HurstLikelihood) -> FGNFit:
    """Maximise a tabulated likelihood: a grid over logit(H), then Newton's method on the profile."""
    grid = torch.sigmoid(torch.linspace(-1, 1, 400, dtype=torch.float64) * (_LOGIT_LIMIT - 1e-6))
    z = torch.logit(grid[table.profile(grid)[0].argmax()]).clone()
    width = 2 * _LOGIT_LIMIT / 399
    low, high = z - width, z + width
    for _ in range(50):
        slope, curvature = _derivatives(table, z)
        step = -slope / curvature if curvature < 0 else torch.sign(slope) * width / 4
        moved = torch.clamp(z + step, low, high).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
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
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        value = table.profile(torch.sigmoid(z))[0]
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, z)
    return slope.detach(), curvature
