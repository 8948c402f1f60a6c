"""One call for the parameters of a fractional Ornstein-Uhlenbeck series, against quadrature and in any units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError, TooFewDrawsError
from stochdyn.fractional import FractionalOU, fou_autocovariance, infer_fou
from stochdyn.fractional.ou import Contrasts

F64 = torch.float64
TIMES = torch.arange(60, dtype=F64)


def _series(rate: float = 0.3, hurst: float = 0.6, seed: int = 0, times: Tensor = TIMES) -> Tensor:
    law = FractionalOU(rate, 5.0, 1.0, hurst, initial="stationary" if rate else 5.0)
    return law.sample(times, (), seed).x[:, 0]


def _infer(*args: Any, **options: Any) -> Any:
    return infer_fou(*args, **{"num_draws": 200, "progress": False, **options})


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("hurst", [0.2, 0.8])
def test_differences_have_the_density_of_the_series_with_a_free_level(regular: bool, hurst: float) -> None:
    """The generalised least squares level, its variance, and the restricted likelihood, by dense algebra."""
    times = TIMES[:30] / 30
    times = (
        times
        if regular
        else times + 0.01 * torch.rand(30, dtype=F64, generator=torch.Generator().manual_seed(0))
    )
    rate, error = 4.0, 0.01
    lags = (times[:, None] - times).abs()
    cov = fou_autocovariance(lags, rate, hurst) + error * torch.eye(30, dtype=F64)
    y = torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(1))
    inverse, one = torch.linalg.inv(cov), torch.ones(30, dtype=F64)
    weight = one @ inverse @ one
    level = one @ inverse @ y / weight
    found = Contrasts(times, y).whiten(*(torch.tensor([v], dtype=F64) for v in (hurst, rate, error)))
    stationary = fou_autocovariance(torch.zeros(1, dtype=F64), rate, hurst)
    torch.testing.assert_close(found.level[0], level, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.level_variance + stationary, 1 / weight[None], rtol=1e-7, atol=1e-9)
    quad = (y - level) @ inverse @ (y - level)
    torch.testing.assert_close(found.white.square().sum(), quad, rtol=1e-8, atol=1e-8)
    log_det = torch.logdet(cov) + weight.log()
    torch.testing.assert_close(2 * found.log_scale.sum(), log_det, rtol=1e-8, atol=1e-7)


def test_the_posterior_is_that_of_quadrature() -> None:
    y = _series()
    posterior = _infer(TIMES, y, 0.0, num_draws=1000).posterior
    # Rate and Hurst index on a grid; the likelihood of differences, with the priors of the docstring.
    logit, log_rate = torch.linspace(-3, 4, 60, dtype=F64), torch.linspace(-7, 8, 70, dtype=F64)
    a, b = (x.flatten() for x in torch.meshgrid(logit, log_rate, indexing="ij"))
    span = 59.0
    contrasts = Contrasts(TIMES / span, y)
    found = contrasts.whiten(a.sigmoid(), b.exp(), torch.zeros_like(a))
    log = -0.5 * 59 * found.white.square().sum(-1).log() - found.log_scale.sum(-1)
    log = log + torch.nn.functional.logsigmoid(a) + torch.nn.functional.logsigmoid(-a)
    log = log + b - torch.log1p(b.exp()) - torch.log1p(b.exp() / 60)
    chance = log.softmax(0)
    for name, value in (("hurst", a.sigmoid()), ("rate", b.exp() / span)):
        mean = float(chance @ value)
        spread = math.sqrt(float(chance @ (value - mean) ** 2))
        assert abs(float(posterior[name].mean()) - mean) < 5 * spread / math.sqrt(500)
        assert abs(float(posterior[name].std()) / spread - 1) < 0.25
    assert posterior.attrs["khat"] < 0.7


def test_units_of_times_and_values_change_nothing() -> None:
    y = _series()
    plain = _infer(TIMES, y, 0.3).posterior
    for time, length, shift in ((1e-12, 1e12, 0.0), (1e12, 1e-12, 3e-12)):
        other = _infer(TIMES * time + 7 * time, y * length + shift, 0.3 * length).posterior
        for name, factor in (("hurst", 1.0), ("rate", 1 / time), ("obs_scale", length)):
            got, want = other[name].to_numpy(), factor * plain[name].to_numpy()
            assert abs(got / want - 1).max() < 1e-5, name


def test_a_path_without_reversion_and_one_with_error_are_told() -> None:
    walk = _series(0.0, 0.5)
    # No reversion within the span isn't excluded, strong reversion is.
    rate = _infer(TIMES, walk, 0.0).posterior["rate"]
    assert float(rate.quantile(0.05)) < 1 / 59
    assert float(rate.quantile(0.9)) < 0.3
    noisy = _series(0.1, 0.8) + torch.randn(60, dtype=F64, generator=torch.Generator().manual_seed(5))
    posterior = _infer(TIMES, noisy).posterior
    assert 0.5 < float(posterior["obs_scale"].mean()) < 1.5


def test_missing_values_are_those_that_are_not_there() -> None:
    y = _series()
    holes = y.clone()
    holes[::7] = torch.nan
    here = ~holes.isnan()
    one = _infer(TIMES, holes, 0.0, num_draws=100)
    two = _infer(TIMES[here].tolist(), y[here].numpy(), 0.0, num_draws=100)
    assert (one.posterior["hurst"] == two.posterior["hurst"]).all()
    assert one.log_likelihood["y"].shape == (1, 100, int(here.sum()) - 1)
    assert set(one.posterior.data_vars) == {"rate", "mean", "scale", "hurst", "obs_scale"}


def test_intervals_of_series_drawn_from_the_prior_hold_the_truth() -> None:
    """Ranks of the Hurst index in 20 posteriors: their mean is a half within five standard errors."""
    g = torch.Generator().manual_seed(2)
    ranks = []
    for k in range(20):
        hurst = 0.1 + 0.8 * float(torch.rand((), generator=g))
        draws = _infer(TIMES, _series(0.3, hurst, k), 0.0, num_draws=100).posterior["hurst"]
        ranks.append(float((draws < hurst).mean()))
    assert abs(sum(ranks) / 20 - 0.5) < 5 * math.sqrt(1 / 12 / 20)
    assert sum(0.05 < r < 0.95 for r in ranks) >= 14


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"times": TIMES.flip(0)}, TimeGridError, "times"),
        ({"y": torch.zeros(59)}, ShapeError, "y"),
        ({"y": torch.full((60,), 2.0)}, InvalidInputError, "constant"),
        ({"y": torch.full((60,), torch.nan)}, EmptyDataError, "short"),
        ({"y": "prices"}, InvalidInputError, "y must be numbers"),
        ({"obs_scale": -1.0}, InvalidInputError, "obs_scale"),
        ({"num_draws": 10}, TooFewDrawsError, "num_draws"),
        ({"seed": "luck"}, InvalidInputError, "seed"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _infer(**{"times": TIMES, "y": _series(), **change})
