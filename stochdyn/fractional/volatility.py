"""Simulated returns of an asset whose volatility is rough."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import check_hurst, check_positive, check_positive_int
from stochdyn.fractional.exact.fbm import sample_fbm

__all__ = ["RoughVolatility", "rough_volatility"]


class RoughVolatility(NamedTuple):
    """What :func:`rough_volatility` returns.

    Attributes:
        realised: ``(days,)`` realised variances, the sums of the squared returns of each day.
        integrated: ``(days,)`` the integrals over each day of the variance, which they estimate.
        spot: ``(days,)`` the variance at the end of each day.
    """

    realised: Tensor
    integrated: Tensor
    spot: Tensor


def rough_volatility(
    days: int,
    hurst: float = 0.1,
    *,
    volatility_of_volatility: float = 0.6,
    mean_log_variance: float = -9.5,
    returns_a_day: int = 78,
    generator: torch.Generator | None = None,
) -> RoughVolatility:
    r"""Simulate returns whose log variance is a fractional Brownian motion.

    .. math::
        \log\sigma_t^2=m+\nu B^H_t,\qquad r_j=\sigma_{t_j}\sqrt{1/M}\,\epsilon_j,\qquad
        \mathrm{RV}_d=\sum_{j\in d}r_j^2,

    with t in days and M returns a day.

    Args:
        days: length of the series.
        hurst: H.
        volatility_of_volatility: :math:`\nu`, standard deviation of the increment of log variance over a day.
        mean_log_variance: m.
        returns_a_day: M; 78 are the five-minute returns of a trading day.
        generator: source of randomness.

    Raises:
        HurstRangeError, InvalidInputError: for an index outside (0, 1), or sizes that aren't positive.

    Example:
        >>> series = rough_volatility(100, generator=torch.Generator().manual_seed(0))
        >>> series.realised.shape, bool((series.realised > 0).all())
        (torch.Size([100]), True)

    Reference:
        J. Gatheral, T. Jaisson and M. Rosenbaum, Volatility is rough, Quantitative Finance 18, 2018.
    """
    check_positive_int(days, "days", 2)
    check_positive_int(returns_a_day, "returns_a_day")
    check_positive(volatility_of_volatility, "volatility_of_volatility")
    check_hurst(hurst)
    level = sample_fbm(hurst, days * returns_a_day, horizon=float(days), generator=generator)
    variance = (mean_log_variance + volatility_of_volatility * level[1:].double()).exp()
    normal = torch.randn(days * returns_a_day, generator=generator, dtype=torch.float64)
    daily = variance.reshape(days, returns_a_day)
    squares = (variance * normal.square()).reshape(days, returns_a_day)
    return RoughVolatility(squares.mean(-1), daily.mean(-1), daily[:, -1].clone())
