"""Does the model fit? Tests of the one-step prediction errors, and warnings that name what was found."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr
from scipy.stats import chi2

from stochdyn.errors import StochdynWarning
from stochdyn.fractional.hurst.data import Block
from stochdyn.fractional.hurst.laws import Law
from stochdyn.fractional.hurst.marginal import whittle_fit

__all__ = ["Checks", "check_errors", "short_memory_test", "warn_of"]

_SURE = 1e-3
_SURE_OF_OUTLIER = (
    1e-6  # real data have heavier tails than the normal law: only what changes the answer is worth a word
)
_LAGS = 12
_SHORTEST_FOR_RATIO, _LONGEST_FOR_RATIO = 64, 16384


class Checks(NamedTuple):
    """P-values of a fit: small where data of the model would hardly look like these.

    Attributes:
        memory: The p-value of the autocorrelations of prediction errors: short memory beside or in place of long.
        season: The p-value of the largest ordinate of their periodogram: a cycle.
        outlier: The p-value of the largest error.
    """

    memory: float
    season: float
    outlier: float


def check_errors(errors: list[np.ndarray]) -> Checks:
    """Test standardised prediction errors ``(n,)`` of each block, independent standard normals if the model is right."""
    found = [_check_one(e) for e in errors if len(e) >= 8]
    if not found:
        return Checks(1.0, 1.0, 1.0)
    count = len(found)
    # the smallest of several p-values, by the chance that the smallest is as small
    return Checks(
        *(float(-math.expm1(count * math.log1p(-min(min(p), 1 - 1e-16)))) for p in zip(*found, strict=True))
    )


def _check_one(e: np.ndarray) -> tuple[float, float, float]:
    n = len(e)
    c = e - e.mean()
    lags = min(_LAGS, n // 4)
    # Autocorrelations of the errors, which vanish up to 1 / sqrt(n) if the model is right.
    rho = np.array([c[k:] @ c[:-k] for k in range(1, lags + 1)]) / (c @ c)
    # Ljung and Box, with a degree of freedom less for the Hurst index
    statistic = n * (n + 2) * (rho**2 / (n - np.arange(1, lags + 1))).sum()
    memory = float(chi2.sf(statistic, max(lags - 1, 1)))
    # Fisher's test of the largest ordinate
    power = np.abs(np.fft.rfft(c)[1 : (n - 1) // 2 + 1]) ** 2
    m = len(power)
    season = 1.0
    if m >= 3:
        g = float(power.max() / power.sum())
        season = min(1.0, m * (1 - g) ** (m - 1))
    # the largest error against the spread of the others
    square = float((c**2).max())
    spread = math.sqrt(max((float(c @ c) - square) / (n - 1), 1e-300))
    outlier = min(1.0, 2 * n * float(ndtr(-math.sqrt(square) / spread)))
    return memory, season, outlier


def short_memory_test(groups: list[list[Block]], law: Law) -> float:
    r"""Return the p-value of an autoregression beside fractional noise, by a likelihood ratio.

    The noise is passed through :math:`y_k=\phi y_{k-1}+x_k`, and twice the gain of the debiased Whittle likelihood, maximised over
    the Hurst index, compared with a chi-squared law of one degree of freedom per series.
    """
    blocks = [
        b for g in groups for b in g if b.complete and not b.gaps and len(b.values) >= _SHORTEST_FOR_RATIO
    ]
    if law != Law("none") or not blocks:
        return 1.0
    both = Law("ar1")
    phi = np.array([-0.8, -0.6, -0.4, -0.25, -0.12, 0.0, 0.12, 0.25, 0.4, 0.6, 0.8, 0.9])
    gain = 0.0
    for block in blocks:
        values = block.values[:_LONGEST_FOR_RATIO]
        n = len(values)
        plain = Block(values, np.arange(n, dtype=float), np.full((n, 1), n**-0.5), 0, 0, 0, n)
        hurst = np.concatenate([np.linspace(0.03, 0.97, 24), [0.985, 0.995]])
        h, p = (v.ravel() for v in np.meshgrid(hurst, phi, indexing="ij"))
        fit = whittle_fit(plain, both, h, p)
        value = (-0.5 * fit.log_det - 0.5 * fit.free * np.log(fit.quadratic)).reshape(len(hurst), len(phi))
        best = np.array([_peak(hurst, column) for column in value.T])
        gain += 2 * max(_peak(phi, best) - best[5], 0.0)
    return float(chi2.sf(gain, len(blocks)))


def _peak(nodes: np.ndarray, values: np.ndarray) -> float:
    """Maximum of a curve through equally or nearly equally spaced nodes, by a parabola at its highest three."""
    i = min(max(int(values.argmax()), 1), len(nodes) - 2)
    curve = np.polynomial.polynomial.polyfit(nodes[i - 1 : i + 2] - nodes[i], values[i - 1 : i + 2], 2)
    if curve[2] >= 0:
        return float(values.max())
    place = np.clip(-curve[1] / (2 * curve[2]), nodes[i - 1] - nodes[i], nodes[i + 1] - nodes[i])
    return float(max(values.max(), np.polynomial.polynomial.polyval(place, curve)))


def warn_of(checks: Checks, hurst: np.ndarray, path: bool, bounds: bool, stacklevel: int) -> None:
    """Say what does not fit, and a posterior that piles up at a bound."""
    high, low = float((hurst > 0.98).mean()), float((hurst < 0.02).mean())
    if bounds and (high > 0.25 or low > 0.25):
        end, cause = ("1", "a trend, or a path where increments were meant: take its differences") if high > low else (
            "0", "increments where a path was meant, differences taken once too often, or errors of observation")  # fmt: skip
        if path and high > low:
            end, cause = "1", "a smooth path, averages that weren't declared, or a trend that isn't straight"
        warnings.warn(
            f"{max(high, low):.0%} of the posterior of the Hurst index lie within 0.02 of {end}: it may be {cause}",
            StochdynWarning,
            stacklevel=stacklevel + 1,
        )
    said = []
    if checks.outlier < _SURE_OF_OUTLIER:
        said.append(f"an outlier (p = {checks.outlier:.1g}; mark it as missing with NaN if it is an error)")
    if checks.season < _SURE:
        said.append(f"a cycle (p = {checks.season:.1g}; give season=period, or regressors)")
    if checks.memory < _SURE:
        said.append(
            f"short memory in the prediction errors (p = {checks.memory:.1g}; try short_memory='ar1' or 'white')"
            if not path
            else f"memory in the prediction errors (p = {checks.memory:.1g}; errors of observation, or another process)"
        )
    if said:
        warnings.warn(
            "fractional noise doesn't fit these data: " + "; ".join(said),
            StochdynWarning,
            stacklevel=stacklevel + 1,
        )
