r"""The exact likelihood of a noisily observed fractional Ornstein-Uhlenbeck series whose level is free.

A free level is integrated out by looking at differences alone, whose law needs no covariance but the variogram

.. math:: \gamma(\tau)=\tfrac12E(X_\tau-X_0)^2=\sigma^2\theta^{-2H}v_H(\theta\tau),\qquad
    \gamma(\tau)\to\tfrac12\sigma^2\tau^{2H}\quad(\theta\to0),

which goes on to fractional Brownian motion where the rate is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.special import gamma, gammaincc, hyp1f1
from torch import Tensor

__all__ = ["Contrasts", "Whitened", "variogram_shape"]

# Up to here the series in z is used, and from here on the asymptotic one.
_SMALL, _LARGE = 1.5, 50.0
_NODES = 400


def variogram_shape(z: np.ndarray, hurst: np.ndarray) -> np.ndarray:
    r"""Return :math:`2v_H(z)/z^{2H}`, one at ``z = 0``, for ``z`` and ``hurst`` that broadcast.

    .. math::
        v_H(z)=\tfrac12z^{2H}\,{}_1F_2\big(1;H+\tfrac12,H+1;\tfrac{z^2}4\big)-\tfrac12\Gamma(2H+1)(\cosh z-1)

    for small z, where the covariance itself would cancel, and half of :math:`\Gamma(2H+1)` less the autocovariance of
    :func:`~stochdyn.fractional.fou_autocovariance` for the others.
    """
    z, hurst = np.broadcast_arrays(np.asarray(z, dtype=float), np.asarray(hurst, dtype=float))
    b = 2 * hurst
    low = np.minimum(z, _SMALL)
    series, term = np.ones_like(low), np.ones_like(low)
    for k in range(12):
        term = term * (low**2 / 4) / ((hurst + 0.5 + k) * (hurst + 1 + k))
        series = series + term
    power = np.where(low > 0, low, 1.0) ** -b * 2 * np.sinh(low / 2) ** 2  # z^{-2H} (cosh z - 1)
    near = series - gamma(b + 1) * power
    middle = np.clip(z, _SMALL, _LARGE)
    curly = (
        np.exp(middle) * gammaincc(b, middle)
        - middle**b / gamma(b + 1) * hyp1f1(1.0, b + 1, -middle)
        + np.exp(-middle)
    )
    far = np.maximum(z, _LARGE)
    tail, term = np.zeros_like(far), np.ones_like(far)
    for n in range(1, 40):
        term = term * (b - n) / far
        tail = tail + 2 * term * (n % 2)
    tail = tail * far ** (b - 1) / gamma(b)
    curly = np.where(z <= _LARGE, curly, tail)
    other = gamma(b + 1) * (0.5 - 0.25 * curly) * 2 * np.maximum(z, _SMALL) ** -b
    return np.where(z <= _SMALL, near, other)


@dataclass(frozen=True)
class Whitened:
    """Differences of a series as independent unit normals under unit noise, for ``D`` sets of parameters.

    Attributes:
        white: The whitened differences ``(D, n-1)``.
        log_scale: The logarithms ``(D, n-1)`` of the standard deviations that they were divided by.
        level: The best estimate ``(D,)`` of the level.
        level_variance: The variance ``(D,)`` of that estimate for unit scale, less that of the stationary law.
    """

    white: Tensor
    log_scale: Tensor
    level: Tensor
    level_variance: Tensor


class Contrasts:
    """The differences of a series ``y (n,)`` at ``times (n,)``, both in units of one.

    Regular times give differences with a Toeplitz covariance, which are whitened in ``n^2`` operations; others take a Cholesky
    factor.
    """

    def __init__(self, times: Tensor, y: Tensor) -> None:
        self.times, self.y = times.double(), y.double()
        gaps = self.times.diff()
        self.step = float(gaps.median())
        self.span = float(self.times[-1] - self.times[0])
        self.regular = bool(((gaps - gaps.mean()).abs() <= 1e-9 * gaps.mean()).all())

    def whiten(self, hurst: Tensor, rate: Tensor, ratio: Tensor) -> Whitened:
        """Whiten the differences for parameters ``(D,)``; ``ratio`` is the error's variance over that of the noise, at unit scale."""
        if self.regular:
            return self._toeplitz(hurst, rate, ratio)
        parts = [self._dense(*p) for p in zip(hurst.tolist(), rate.tolist(), ratio.tolist(), strict=True)]
        return Whitened(*(torch.stack(x) for x in zip(*parts, strict=True)))

    def _toeplitz(self, hurst: Tensor, rate: Tensor, ratio: Tensor) -> Whitened:
        count = self.y.shape[0]
        lags = (self.span / (count - 1)) * np.arange(count)
        h = hurst.numpy()[:, None]
        shape = variogram_shape(lags * rate.numpy()[:, None], h)
        g = torch.from_numpy(0.5 * lags ** (2 * h) * shape)
        # With g the variogram, Cov(y_i+1 - y_i, y_j+1 - y_j) = g(k+1) + g(k-1) - 2 g(k), k = |i - j|; errors add 2 s^2 at lag 0 and -s^2 at 1.
        # Cov of neighbouring differences, and of differences with the first value, in the variogram's sense.
        ahead = torch.cat((g[:, 1:2], g[:, :-1]), -1)
        cov = (torch.cat((g[:, 1:], g[:, -1:]), -1) + ahead - 2 * g)[:, :-1]
        cov[:, 0] += 2 * ratio
        if cov.shape[1] > 1:
            cov[:, 1] -= ratio
        first = g[:, :-1] - g[:, 1:]
        first[:, 0] -= ratio
        data = torch.stack((self.y.diff().expand_as(first), first), -1)
        white, log_scale = _levinson(cov, data)
        return self._finish(white, log_scale, ratio)

    def _dense(self, hurst: float, rate: float, ratio: float) -> tuple[Tensor, ...]:
        t = self.times.numpy()
        gaps = np.abs(t[:, None] - t)
        g = torch.from_numpy(0.5 * gaps ** (2 * hurst) * self._interpolated(gaps * rate, hurst))
        # Differences from the first value: Cov(y_i - y_0, y_j - y_0) = g(i) + g(j) - g(i - j), with the error of y_0 in all of them.
        cov = g[1:, :1] + g[:1, 1:] - g[1:, 1:] + ratio
        cov.diagonal().add_(ratio)
        first = -g[1:, 0] - ratio
        factor = torch.linalg.cholesky(cov)
        data = torch.stack((self.y[1:] - self.y[0], first), -1)
        white = torch.linalg.solve_triangular(factor, data, upper=False)
        one = torch.tensor([ratio], dtype=torch.float64)
        found = self._finish(white[None], factor.diagonal().log()[None], one)
        return found.white[0], found.log_scale[0], found.level[0], found.level_variance[0]

    def _interpolated(self, z: np.ndarray, hurst: float) -> np.ndarray:
        """Return :func:`variogram_shape` at very many points, by a spline in log z."""
        largest = float(z.max())
        if not largest > 0:
            return np.ones_like(z)
        smallest = float(z[z > 0].min())
        nodes = np.linspace(math.log(smallest) - 1e-9, math.log(largest) + 1e-9, _NODES)
        spline = CubicSpline(nodes, variogram_shape(np.exp(nodes), np.array(hurst)))
        out = spline(np.log(np.where(z > 0, z, smallest)))
        return np.where(z > 0, out, 1.0)

    def _finish(self, white: Tensor, log_scale: Tensor, ratio: Tensor) -> Whitened:
        """Estimate the level: the first value, corrected by what the differences say of it."""
        # E[level | differences] = y_0 - Cov(y_0, d) Cov(d)^-1 d, and its variance is that of y_0 less |Cov(d)^(-1/2) Cov(d, y_0)|^2.
        data, first = white.unbind(-1)
        level = self.y[0] - (first * data).sum(-1)
        return Whitened(data, log_scale, level, ratio - first.square().sum(-1))


def _levinson(cov: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten ``x (D, n, c)`` under Toeplitz covariances with first rows ``cov (D, n)``, by the Durbin-Levinson recursion."""
    count = x.shape[1]
    variance = cov[:, 0].clone()
    phi = cov.new_zeros(cov.shape[0], 0)
    white, logs = [x[:, 0] / variance.sqrt()[:, None]], [0.5 * variance.log()]
    backwards = cov.flip(-1)
    for n in range(1, count):
        # reflection = (c_n - sum_j phi_j c_{n-j}) / v
        past = backwards[:, count - n : count - 1] if n > 1 else cov[:, :0]
        reflection = (cov[:, n] - (phi * past).sum(-1)) / variance
        phi = torch.cat((phi - reflection[:, None] * phi.flip(-1), reflection[:, None]), -1)
        variance = variance * (1 - reflection.square())
        seen = x[:, :n].flip(1)
        residual = x[:, n] - torch.einsum("dk,dkc->dc", phi, seen)
        white.append(residual / variance.sqrt()[:, None])
        logs.append(0.5 * variance.log())
    return torch.stack(white, 1), torch.stack(logs, 1)
