"""Are ranks uniform? The chi-square test, and simultaneous bands for the empirical distribution function."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stochdyn._checks import as_tensor, check_positive_int, check_real
from stochdyn.errors import EmptyDataError, InvalidInputError, TooFewDrawsError

__all__ = ["EcdfBand", "UniformityTest", "ecdf_band", "rank_uniformity"]


@dataclass(frozen=True)
class EcdfBand:
    """A band that the empirical distribution function of uniform values leaves with a known probability.

    Attributes:
        points: The points ``(K,)`` where the function is looked at, inside (0, 1).
        lower: The lower edge ``(K,)``, inclusive.
        upper: The upper edge ``(K,)``, inclusive.
        level: The probability that the function is inside at all points; at least what was asked for.
    """

    points: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    level: float


@dataclass(frozen=True)
class UniformityTest:
    """Whether ranks look uniform.

    Attributes:
        chi2: Pearson's statistic over ``num_bins`` bins.
        pvalue: The p-value of that statistic.
        num_bins: The number of bins, each expecting five ranks or more.
        inside: Whether the empirical distribution function stays in the band of the asked level.
        excess: The largest distance outside the band; 0 if inside.
    """

    chi2: float
    pvalue: float
    num_bins: int
    inside: bool
    excess: float


def ecdf_band(num_values: int, points: np.ndarray | int = 50, level: float = 0.95) -> EcdfBand:
    r"""Return simultaneous bands for the empirical distribution function of independent uniform values.

    At each point :math:`z` the count of values below it is binomial. The band cuts off the same probability
    :math:`\gamma/2` at either side of every point; :math:`\gamma` is the largest for which

    .. math:: P\big(L_k\le N\hat F(z_k)\le U_k\ \text{for all }k\big)\ge\mathtt{level},

    and this probability is computed exactly, by a recursion over the points: given the count at :math:`z_k`,
    the rest is binomial on the interval to :math:`z_{k+1}`.

    Args:
        num_values: The number of values, ``N``.
        points: Increasing points inside (0, 1), or how many equally spaced ones.
        level: The probability that uniform values stay in the whole band.

    Returns:
        The band.

    Raises:
        InvalidInputError: If the level or a point isn't inside (0, 1), or points don't increase.

    Example:
        >>> band = ecdf_band(100, points=4)
        >>> band.lower.tolist(), band.upper.tolist()
        ([0.11, 0.29, 0.49, 0.7], [0.3, 0.51, 0.71, 0.89])

    Reference:
        Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison", 2022, section 2.2.
    """
    check_positive_int(num_values, "num_values")
    check_real(level, "level", above=0.0, below=1.0)
    if isinstance(points, int):
        check_positive_int(points, "points")
        z = np.arange(1, points + 1) / (points + 1)
    else:
        z = as_tensor(points, "points").double().cpu().numpy()
    if z.ndim != 1 or z.size == 0 or not ((z > 0) & (z < 1)).all() or (np.diff(z) <= 0).any():
        raise InvalidInputError("points must increase inside (0, 1)", got=np.array2string(z, threshold=8))
    return _band(num_values, tuple(z.tolist()), level)


@functools.lru_cache(maxsize=64)
def _band(num_values: int, points: tuple[float, ...], level: float) -> EcdfBand:
    # The simultaneous level by bisection in the pointwise one.
    z = np.array(points)
    low, high = 0.0, 1 - level  # no simultaneous band is narrower than the pointwise one
    for _ in range(18):
        gamma = 0.5 * (low + high)
        lower, upper = _edges(num_values, z, gamma)
        if _inside_probability(num_values, z, lower, upper) >= level:
            low = gamma
        else:
            high = gamma
    lower, upper = _edges(num_values, z, low)
    reached = _inside_probability(num_values, z, lower, upper)
    arrays = (z, lower / num_values, upper / num_values)
    for array in arrays:
        array.setflags(write=False)  # bands are kept and shared
    return EcdfBand(*arrays, reached)


def _edges(num_values: int, z: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    # counts c with P(C <= c) > gamma / 2 and P(C >= c) > gamma / 2
    lower = stats.binom.ppf(gamma / 2, num_values, z)
    upper = stats.binom.isf(gamma / 2, num_values, z)
    return np.maximum(lower, 0).astype(int), np.minimum(upper, num_values).astype(int)


def _inside_probability(num_values: int, z: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    # The counts below increasing points are a Markov chain: given c of n below z_{k-1}, the rise to z_k is binomial with n - c
    # trials of probability (z_k - z_{k-1}) / (1 - z_{k-1}). What leaves the band is cut off at every point.
    counts = np.arange(lower[0], upper[0] + 1)
    mass = stats.binom.pmf(counts, num_values, z[0])
    for k in range(1, z.size):
        target = np.arange(lower[k], upper[k] + 1)
        step = (z[k] - z[k - 1]) / (1 - z[k - 1])
        rise = target[None, :] - counts[:, None]
        mass = mass @ stats.binom.pmf(rise, (num_values - counts)[:, None], step)
        counts = target
    return float(mass.sum())


def rank_uniformity(ranks: np.ndarray, num_ranks: int, level: float = 0.95) -> UniformityTest:
    """Test whether ranks are uniform on ``0, ..., num_ranks - 1``.

    Args:
        ranks: The integers ``(N,)``.
        num_ranks: The number of values a rank can take: one more than the draws it counts.
        level: The probability that uniform ranks stay in the band.

    Returns:
        Both tests. The chi-square one sees any unevenness, the band is sharper for bias and wrong spread.

    Raises:
        EmptyDataError: If there are no ranks.
        TooFewDrawsError: If there are fewer than ten ranks, which fill no two bins.
        InvalidInputError: If a rank is out of range.

    Example:
        >>> rank_uniformity(np.arange(100) % 10, 10).pvalue
        1.0
    """
    check_positive_int(num_ranks, "num_ranks", 2)
    check_real(level, "level", above=0.0, below=1.0)
    values = as_tensor(ranks, "ranks").double().cpu().numpy()
    if values.size == 0:
        raise EmptyDataError("ranks is empty")
    if (values != np.round(values)).any():
        raise InvalidInputError("ranks must be whole numbers", got=np.array2string(values, threshold=8))
    if values.size < 10:
        raise TooFewDrawsError("too few ranks to test", got=values.size, expected="at least 10")
    if values.min() < 0 or values.max() >= num_ranks:
        raise InvalidInputError(
            "ranks are out of range",
            got=f"{values.min():g} to {values.max():g}",
            expected=f"0 to {num_ranks - 1}",
        )
    bins = int(max(2, min(num_ranks, values.size // 5, 20)))
    first = np.ceil(np.arange(bins + 1) * num_ranks / bins).astype(int)  # unequal bins expect unequal counts
    expected = values.size * np.diff(first) / num_ranks
    observed = np.histogram(values, bins=first - 0.5)[0]
    # Pearson's sum (O - E)^2 / E.
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    points = rank_points(num_ranks)
    band = ecdf_band(values.size, points, level)
    ecdf = rank_ecdf(values, num_ranks, points)
    excess = float(np.maximum(ecdf - band.upper, band.lower - ecdf).max())
    inside = excess <= 1e-12
    return UniformityTest(chi2, float(stats.chi2.sf(chi2, bins - 1)), bins, inside, 0.0 if inside else excess)


def rank_points(num_ranks: int, at_most: int = 100) -> np.ndarray:
    """Return points at which uniform ranks have exactly the distribution function of uniform values."""
    number = min(num_ranks - 1, at_most)
    return np.unique(np.round(np.arange(1, number + 1) * num_ranks / (number + 1))) / num_ranks


def rank_ecdf(ranks: np.ndarray, num_ranks: int, points: np.ndarray) -> np.ndarray:
    """Return the fraction of ranks below each of ``points`` times ``num_ranks``."""
    edges = np.round(points * num_ranks)
    return np.searchsorted(np.sort(ranks), edges, side="left") / len(ranks)


def binomial_interval(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson interval of a proportion.

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = stats.norm.isf((1 - level) / 2)
    fraction = successes / trials
    # Wilson: (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    centre = (fraction + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(fraction * (1 - fraction) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
