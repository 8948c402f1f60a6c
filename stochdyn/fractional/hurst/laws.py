"""Laws of the data given the Hurst index and one more parameter: fractional noise or the increments of a path, and what is beside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.signal import lfilter
from scipy.special import expit

from stochdyn.fractional.exact.fbm import fgn_autocovariance

__all__ = ["Beside", "Law"]

Beside = Literal["none", "white", "ar1", "errors"]
_FORGOTTEN = 1e-14


@dataclass(frozen=True)
class Law:
    r"""Correlations of a stationary series, by lags, and of what is seen of it at any times; step 1, variance 1.

    Attributes:
        beside: What stands beside the fractional part: ``"none"``; ``"white"``, a share f of the variance is white noise;
            ``"ar1"``, fractional noise passed through :math:`y_k=\phi y_{k-1}+x_k`; ``"errors"``, increments of a path, a share f
            of whose variance comes from independent errors of its positions.
        window: The length of the window, in steps, over which a position is averaged.
    """

    beside: Beside = "none"
    window: float = 0.0

    def limits(self, known: bool) -> tuple[float, float] | None:
        """The interval of the coordinate a of the further parameter.

        It is phi itself, the logit of a share, or, where the errors are known, the logarithm of the deviation of an increment
        without them, in units of the data's spread.
        """
        if self.beside == "none":
            return None
        if self.beside == "ar1":
            return (-0.98, 0.98)
        return (-5.0, 6.0) if known else (-12.0, 9.0)

    def value(self, a: np.ndarray, eta: float | None) -> np.ndarray:
        """The further parameter at coordinates a, for errors of deviation ``eta`` if that is known."""
        if eta is not None:
            return np.asarray(2 * eta**2 / (np.exp(2 * a) + 2 * eta**2))
        return np.asarray(expit(a) if self.beside in ("white", "errors") else a)

    def log_prior(self, a: np.ndarray, eta: float | None) -> np.ndarray:
        """Log density of a: phi and shares are uniform, and so is the logarithm of a deviation."""
        if eta is None and self.beside in ("white", "errors"):
            return np.asarray(-np.logaddexp(0, -a) - np.logaddexp(0, a))
        return np.zeros_like(a)

    # ----------------------------------------------------------------------------------- regular series

    def pure(self, n: int, hurst: np.ndarray) -> np.ndarray:
        """Autocovariance ``(M, n)`` of the fractional part alone, of unit scale."""
        if self.window == 0:
            return np.asarray(fgn_autocovariance(n, torch.from_numpy(hurst)).numpy())
        k = np.arange(n)
        d = [self._variogram(k + s, hurst) for s in (-1, 0, 1)]
        return np.asarray(0.5 * (d[0] + d[2]) - d[1])

    def variance(self, hurst: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Variance ``(M,)`` of a value over the square of the scale of its fractional part."""
        pure = self.pure(1, hurst)[:, 0]
        if self.beside == "ar1":
            return np.array([self._filtered(1, h, p)[0] for h, p in zip(hurst, other, strict=True)])
        if self.beside in ("white", "errors"):
            return np.asarray(pure / (1 - other))
        return np.asarray(pure)

    def correlations(self, n: int, hurst: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Autocorrelations ``(M, n)``."""
        if self.beside == "ar1":
            rows = np.stack([self._filtered(n, h, p) for h, p in zip(hurst, other, strict=True)])
            return np.asarray(rows / rows[:, :1])
        r = self.pure(n, hurst)
        r = r / r[:, :1]
        if self.beside == "none":
            return r
        share = other[:, None]
        r = (1 - share) * r
        r[:, 0] += other
        if self.beside == "errors" and n > 1:
            r[:, 1] -= 0.5 * other
        return r

    def _filtered(self, n: int, hurst: float, phi: float) -> np.ndarray:
        """Autocovariance at lags 0 to n-1 of fractional noise through 1 / (1 - phi L)."""
        memory = 1 if abs(phi) < 1e-12 else math.ceil(math.log(_FORGOTTEN) / math.log(abs(phi))) + 1
        r = self.pure(n + memory, np.array([hurst]))[0]
        both = np.concatenate([r[:0:-1], r])
        # u(k) = sum_j phi^j r(k - j); the autocovariance is [u(k) + u(-k) - r(k)] / (1 - phi^2)
        u = lfilter([1.0], [1.0, -phi], both)
        middle = len(r) - 1
        return np.asarray((u[middle : middle + n] + u[middle : middle - n : -1] - r[:n]) / (1 - phi**2))

    # ------------------------------------------------------------------------------------- any times

    def _variogram(self, lag: np.ndarray, hurst: np.ndarray) -> np.ndarray:
        """E[(B(t + lag) - B(t))^2] of the path, or of its averages over the window, ``(M, *lag)``."""
        h = hurst.reshape(-1, *(1,) * lag.ndim)
        x = np.abs(lag)[None]
        e = self.window
        if e == 0:
            return np.asarray(np.where(x > 0, np.where(x > 0, x, 1.0) ** (2 * h), 0.0))
        third = [np.abs(x + s * e) ** (2 * h + 2) for s in (-1, 0, 1)]
        return np.asarray(
            (third[0] - 2 * third[1] + third[2] - 2 * e ** (2 * h + 2)) / ((2 * h + 1) * (2 * h + 2) * e**2)
        )

    def _correlation(self, lag: np.ndarray, hurst: np.ndarray) -> np.ndarray:
        """The covariance of the noise over two steps of length one that end ``lag`` apart, ``(M, *lag)``."""
        d = [self._variogram(lag + s, hurst) for s in (-1, 0, 1)]
        near = 0.5 * (d[0] + d[2]) - d[1]
        # k^(2H) [(1 + 1/k)^(2H) + (1 - 1/k)^(2H) - 2] / 2 with expm1, since the terms cancel at long lags
        h, k = hurst.reshape(-1, *(1,) * lag.ndim), np.maximum(lag, 2.0)
        bracket = np.expm1(2 * h * np.log1p(1 / k)) + np.expm1(2 * h * np.log1p(-1 / k))
        return np.asarray(np.where(lag > 2, 0.5 * k ** (2 * h) * bracket, near))

    def covariances(
        self, times: np.ndarray, hurst: np.ndarray, other: np.ndarray, differences: bool
    ) -> np.ndarray:
        """Covariances ``(M, n, n)`` at times in steps, of noise over the step before each or of differences between them.

        The scale is that of :meth:`correlations`: variance 1 for a value over one step.
        """
        if not differences:
            gap = times[:, None] - times
            if self.beside == "ar1":  # only on a grid, with values missing
                place = np.rint(np.abs(gap)).astype(int)
                rows = self.correlations(int(place.max()) + 1, hurst, other)
                return np.asarray(rows[:, place])
            r = self._correlation(np.abs(gap), hurst)
            if self.beside == "white":
                r = (1 - other)[:, None, None] * r + other[:, None, None] * np.eye(len(times))
            return np.asarray(r)
        # differences of levels: Cov = [D(b - c) + D(a - d) - D(b - d) - D(a - c)] / 2 for (a, b) and (c, d)
        v = self._variogram(times[:, None] - times, hurst)
        r = 0.5 * (v[:, 1:, :-1] + v[:, :-1, 1:] - v[:, 1:, 1:] - v[:, :-1, :-1])
        r = r / self.pure(1, hurst)[:, :, None]
        if self.beside == "errors":
            n = len(times) - 1
            errors = np.eye(n) - 0.5 * np.eye(n, k=1) - 0.5 * np.eye(n, k=-1)
            r = (1 - other)[:, None, None] * r + other[:, None, None] * errors
        return np.asarray(r)
