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
        returns_per_day=steps,
        **options,
    )


STRIKES = torch.tensor([-0.1787, 0.0, 0.1041], dtype=F64)


def calls(log_price: torch.Tensor) -> torch.Tensor:
    """Payoffs ``(paths, 3)`` of the calls at the last time."""
    return (log_price[:, -1:].exp() - STRIKES.exp()).clamp_min(0)


def test_calls_without_leverage_are_means_of_the_formula_of_black() -> None:
    """Given its variance the log price is Gaussian: payoffs and prices on the same paths have one mean, whatever the steps."""
    paths = bergomi(0.25, 52, sample_shape=20000, generator=0)
    width = paths.integrated.sqrt()  # the variance over all of the time, which is one unit
    d = -STRIKES / width
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    black = normal.cdf(d + width / 2) - STRIKES.exp() * normal.cdf(d - width / 2)
    gap = calls(paths.log_price) - black
    assert bool((gap.mean(0).abs() < 5 * gap.std(0) / math.sqrt(20000)).all())


def test_calls_do_not_depend_on_the_step_and_leverage_tilts_them() -> None:
    """Two step sizes agree within five standard errors; volatility falls with the strike where leverage is negative."""
    coarse, fine = (
        calls(bergomi(0.25, steps, leverage=-0.9, sample_shape=10000, generator=steps).log_price)
        for steps in (104, 312)
    )
    error = ((coarse.var(0) + fine.var(0)) / 10000).sqrt()
    assert bool(((coarse.mean(0) - fine.mean(0)).abs() < 5 * error).all())
    smile = [implied(float(price), float(k), 0.25) for price, k in zip(fine.mean(0), STRIKES, strict=True)]
    assert smile[0] > smile[1] > smile[2]


def test_calls_with_leverage_have_the_prices_of_another_computation() -> None:
    """Paths from the exact joint covariance, and Black's formula given the variance: within five standard errors of both."""
    hurst, eta, rho, xi, steps, count = 0.07, 1.9, -0.9, 0.235**2, 40, 20000
    t = torch.arange(1, steps + 1, dtype=F64) / steps
    # type II noise has the variance t^2H; its covariance with dW over step j is the integral of the kernel over the step
    level = fbm_covariance(t, hurst, kind="II")
    begin, end = ((t[:, None] - edge).clamp_min(0) ** (hurst + 0.5) for edge in (t - t[0], t))
    cross = math.sqrt(2 * hurst) * (begin - end) / (hurst + 0.5)
    whole = torch.cat(
        [torch.cat([level, cross], 1), torch.cat([cross.mT, torch.eye(steps, dtype=F64) / steps], 1)]
    )
    root = torch.linalg.cholesky(whole + 1e-12 * torch.eye(2 * steps, dtype=F64))
    drawn = torch.randn(count, 2 * steps, generator=torch.Generator().manual_seed(0), dtype=F64) @ root.mT
    before = torch.nn.functional.pad(drawn[:, : steps - 1], (1, 0))
    v = xi * torch.exp(eta * before - 0.5 * eta**2 * (t - t[0]) ** (2 * hurst))
    spot = (rho * (v.sqrt() * drawn[:, steps:]).sum(1) - 0.5 * rho**2 * v.mean(1)).exp()[:, None]
    width = ((1 - rho**2) * v.mean(1, keepdim=True)).sqrt()
    strikes = STRIKES.exp()
    d = (spot / strikes).log() / width
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    prices = spot * normal.cdf(d + width / 2) - strikes * normal.cdf(d - width / 2)
    paid = calls(bergomi(1.0, steps, leverage=rho, sample_shape=count, generator=1).log_price)
    error = ((prices.var(0) + paid.var(0)) / count).sqrt()
    assert bool(((prices.mean(0) - paid.mean(0)).abs() < 5 * error).all())


def test_the_price_is_a_martingale_and_the_variance_has_its_curve() -> None:
    """All within five of their own standard errors."""

    def curve(t: torch.Tensor) -> torch.Tensor:
        return 0.04 * (1 + t)

    paths = rough_volatility(
        2, 0.1, volatility_of_volatility=1.0, forward_variance=curve, leverage=-0.7, returns_per_day=50, sample_shape=20000,
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
    """The scheme is exact over the first step, within five standard errors, and close to exact over ten."""
    paths = rough_volatility(
        10,
        0.1,
        volatility_of_volatility=1.0,
        forward_variance=1.0,
        returns_per_day=1,
        sample_shape=40000,
        generator=2,
    )
    t = torch.arange(1.0, 11.0, dtype=F64)
    level = paths.spot.log() + 0.5 * t**0.2
    exact = fbm_covariance(t, 0.1, "II")
    assert abs(float(level[:, 0].var()) - 1) < 5 * math.sqrt(2 / 40000)
    assert float((torch.cov(level.T) - exact).abs().max()) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"leverage": -0.5}, {"leverage": 2.0, "forward_variance": 1.0}, {"forward_variance": -1.0},
        {"forward_variance": [1.0, 2.0]}, {"forward_variance": 1.0, "mean_log_variance": -9.0}, {"returns_per_day": 0},
        {"volatility_of_volatility": 0.0}, {"sample_shape": -1},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        rough_volatility(3, **options)
