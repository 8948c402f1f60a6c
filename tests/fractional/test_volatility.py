"""Rough volatility: a martingale, its forward variances, exact covariances, and the prices of calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from stochdyn.errors import InvalidInputError
from stochdyn.fractional import fbm_covariance, rough_volatility

F64 = torch.float64


def implied(price: float, k: float, t: float) -> float:
    """Volatility at which the formula of Black gives the price of a call on log strike k, spot 1."""

    def excess(v: float) -> float:
        d = -k / (v * math.sqrt(t))
        half = v * math.sqrt(t) / 2
        return float(norm.cdf(d + half) - math.exp(k) * norm.cdf(d - half) - price)

    return float(brentq(excess, 1e-3, 2.0))


def bergomi(t: float, steps: int, **options: Any) -> Any:
    """Rough Bergomi over t years, which is one unit of time: eta = 1.9, H = 0.07, xi = 0.235^2."""
    return rough_volatility(
        1,
        0.07,
        volatility_of_volatility=1.9 * t**0.07,
        forward_variance=0.235**2 * t,
        returns_a_day=steps,
        **options,
    )


def test_calls_of_the_rough_bergomi_model() -> None:
    """Implied volatilities at a quarter of a year, rho = -0.9, of McCrickerd and Pakkanen, Quantitative Finance 18, 2018.

    Within 0.0025: three standard errors of 40 000 paths, and what 312 steps leave.
    """
    paths = bergomi(0.25, 312, leverage=-0.9, sample_shape=40000, generator=0)
    price = paths.log_price[:, -1].exp()
    for k, published in ((-0.1787, 0.2961), (0.0, 0.2061), (0.1041, 0.1576)):
        call = float((price - math.exp(k)).clamp_min(0).mean())
        assert implied(call, k, 0.25) == pytest.approx(published, abs=0.0025)


def test_the_price_is_a_martingale_and_the_variance_has_its_curve() -> None:
    """All within five of their own standard errors."""

    def curve(t: torch.Tensor) -> torch.Tensor:
        return 0.04 * (1 + t)

    paths = rough_volatility(
        2, 0.1, volatility_of_volatility=1.0, forward_variance=curve, leverage=-0.7, returns_a_day=50, sample_shape=20000,
        generator=1,
    )  # fmt: skip
    price = paths.log_price[:, [50, 100]].exp()
    assert bool(((price.mean(0) - 1).abs() < 5 * price.std(0) / math.sqrt(20000)).all())
    expected = curve(torch.arange(100, dtype=F64) / 50).reshape(2, 50).mean(-1)
    error = paths.integrated.std(0) / math.sqrt(20000)
    assert bool(((paths.integrated.mean(0) - expected).abs() < 5 * error).all())
    returns = paths.log_price.diff(dim=-1)[:, :50].sum(-1)
    move = paths.spot[:, 0].log()
    assert float(torch.corrcoef(torch.stack([returns, move]))[0, 1]) < -0.2


def test_log_variance_has_the_covariance_of_type_two_noise() -> None:
    """Hybrid scheme on ten steps against the exact covariance: within 3 % of the variance."""
    paths = rough_volatility(
        10,
        0.1,
        volatility_of_volatility=1.0,
        forward_variance=1.0,
        returns_a_day=1,
        sample_shape=40000,
        generator=2,
    )
    t = torch.arange(1.0, 11.0, dtype=F64)
    level = paths.spot.log() + 0.5 * t**0.2
    exact = fbm_covariance(t, 0.1, "II")
    assert float((torch.cov(level.T) - exact).abs().max()) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"leverage": -0.5}, {"leverage": 2.0, "forward_variance": 1.0}, {"forward_variance": -1.0},
        {"forward_variance": [1.0, 2.0]}, {"forward_variance": 1.0, "mean_log_variance": -9.0}, {"returns_a_day": 0},
        {"volatility_of_volatility": 0.0}, {"sample_shape": -1},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        rough_volatility(3, **options)
