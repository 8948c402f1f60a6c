"""The tabulated likelihood equals the dense one, and its maximum is the published answer for the Nile."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import toeplitz
from torch import Tensor
from torch.distributions import MultivariateNormal

from stochdyn.datasets import nile_minima
from stochdyn.errors import (
    EmptyDataError,
    HurstRangeError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TooFewDrawsError,
)
from stochdyn.fractional import HurstLikelihood, fgn_autocovariance, fit_fgn, hurst_log_likelihood, sample_fgn

F64 = torch.float64


def dense(series: Tensor, hurst: float, mean: float, scale: float, step: float = 1.0) -> float:
    cov = scale**2 * torch.as_tensor(toeplitz(fgn_autocovariance(len(series), hurst, step).numpy()))
    return float(MultivariateNormal(torch.full_like(series, mean), cov).log_prob(series))


@pytest.fixture(scope="module")
def nile() -> HurstLikelihood:
    return HurstLikelihood(nile_minima().level)


@pytest.mark.parametrize("hurst", [0.003, 0.1, 0.35, 0.5, 0.8315, 0.95, 0.99])
def test_table_equals_the_dense_likelihood(nile: HurstLikelihood, hurst: float) -> None:
    for mean, scale in ((1150.0, 89.0), (1100.0, 150.0)):
        exact = dense(nile.series, hurst, mean, scale)
        assert float(nile(hurst, mean, scale)) == pytest.approx(exact, abs=1e-6, rel=1e-10)


def test_table_is_as_exact_as_it_says_near_the_peak(nile: HurstLikelihood) -> None:
    assert nile.error < 1e-8
    for hurst in (0.78, 0.8, 0.83, 0.86, 0.9):
        assert float(nile(hurst, 1150.0, 89.0)) == pytest.approx(
            dense(nile.series, hurst, 1150.0, 89.0), abs=1e-8
        )


def test_steps_other_than_one(nile: HurstLikelihood) -> None:
    series = nile.series[:100] / 50
    table = HurstLikelihood(series, dt=0.25)
    assert float(table(0.7, 23.0, 2.0)) == pytest.approx(dense(series, 0.7, 23.0, 2.0, 0.25), abs=1e-8)
    one, quarter = fit_fgn(series), fit_fgn(series, dt=0.25)
    assert quarter.hurst == pytest.approx(one.hurst, abs=1e-9)
    assert quarter.scale == pytest.approx(one.scale * 0.25**-one.hurst, rel=1e-8)
    assert quarter.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-8)


def test_pointwise_densities_are_conditional_and_add_up(nile: HurstLikelihood) -> None:
    h, m, s = (torch.tensor(v, dtype=F64) for v in ([0.7, 0.9], [1150.0, 1100.0], [80.0, 100.0]))
    parts = nile.pointwise(h, m, s)
    assert parts.shape == (2, 663)
    assert torch.allclose(parts.sum(-1), nile(h, m, s), rtol=1e-10)
    # the first two by hand
    first = dense(nile.series[:1], 0.7, 1150.0, 80.0)
    both = dense(nile.series[:2], 0.7, 1150.0, 80.0)
    assert parts[0, 0].item() == pytest.approx(first, abs=1e-9)
    assert parts[0, 1].item() == pytest.approx(both - first, abs=1e-9)


def test_gradients(nile: HurstLikelihood) -> None:
    short = HurstLikelihood(nile.series[:50])
    inputs = [
        torch.tensor(v, dtype=F64, requires_grad=True)
        for v in ([0.2, 0.7, 0.95], [1140.0, 1150.0, 1160.0], [80.0, 90.0, 99.0])
    ]
    assert torch.autograd.gradcheck(short, inputs)
    assert torch.autograd.gradcheck(lambda h: short.profile(h)[0], inputs[:1])


def test_profile_is_the_maximum_over_mean_and_scale(nile: HurstLikelihood) -> None:
    value, mean, scale = nile.profile(0.7)
    assert float(nile(0.7, mean, scale)) == pytest.approx(float(value), abs=1e-8)
    for dm, ds in ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)):
        assert float(nile(0.7, mean + dm, scale + ds)) < float(value)
    best_scale, best_mean, deviation = nile.conditional(torch.tensor(0.7, dtype=F64))
    assert (float(best_scale), float(best_mean)) == pytest.approx((float(scale), float(mean)))
    # one deviation off in the mean costs half a nat
    off = nile(0.7, mean + deviation * scale, scale)
    assert float(value - off) == pytest.approx(0.5, abs=1e-7)


def test_published_maximum_likelihood_of_the_nile() -> None:
    fit = fit_fgn(nile_minima().level)
    assert fit.hurst == pytest.approx(0.8315, abs=5e-5)
    assert fit.stderr == pytest.approx(0.0246, abs=5e-5)
    assert fit.mean == pytest.approx(1149.88, abs=5e-3)
    assert fit.scale == pytest.approx(89.14, abs=5e-3)
    assert fit.log_likelihood == pytest.approx(-3757.463, abs=5e-4)


def test_fit_is_a_stationary_maximum(nile: HurstLikelihood) -> None:
    fit = fit_fgn(nile.series)
    h = torch.tensor(fit.hurst, dtype=F64, requires_grad=True)
    value = nile.profile(h)[0]
    (slope,) = torch.autograd.grad(value, h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, h)
    assert abs(float(slope.detach())) < 1e-6
    assert fit.stderr == pytest.approx(float(-curvature) ** -0.5, rel=1e-6)
    grid = torch.linspace(0.01, 0.99, 500, dtype=F64)
    assert float(hurst_log_likelihood(grid, nile.series).max()) <= fit.log_likelihood


def test_fit_follows_shift_and_scale() -> None:
    y = sample_fgn(0.3, 200, generator=torch.Generator().manual_seed(0))
    a, b = fit_fgn(y), fit_fgn(1000 - 20 * y)
    assert b.hurst == pytest.approx(a.hurst, abs=1e-8)
    assert b.mean == pytest.approx(1000 - 20 * a.mean, rel=1e-9)
    assert b.scale == pytest.approx(20 * a.scale, rel=1e-8)
    assert b.log_likelihood == pytest.approx(a.log_likelihood - 200 * math.log(20), abs=1e-6)


def test_a_series_with_its_maximum_at_the_edge() -> None:
    """Differences of white noise have H = 0: the fit stays inside and finite but for its error."""
    y = torch.randn(301, generator=torch.Generator().manual_seed(0), dtype=F64).diff()
    fit = fit_fgn(y)
    assert 0 < fit.hurst < 0.05
    assert math.isfinite(fit.log_likelihood)


def test_bad_series() -> None:
    good = sample_fgn(0.5, 50, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EmptyDataError, match="series is empty"):
        fit_fgn(torch.empty(0))
    with pytest.raises(TooFewDrawsError, match="series is too short; got 5 values"):
        fit_fgn(good[:5])
    with pytest.raises(NonFiniteError, match=r"series\[3\]=nan"):
        fit_fgn(good.index_fill(0, torch.tensor(3), float("nan")))
    with pytest.raises(ShapeError, match="wrong number of axes"):
        fit_fgn(good[:, None])
    with pytest.raises(InvalidInputError, match="series is constant"):
        fit_fgn(torch.full((50,), 3.0))
    with pytest.raises(InvalidInputError, match="series is constant"):
        fit_fgn([1.0] * 50)
    assert fit_fgn(good.tolist()).hurst == pytest.approx(fit_fgn(good.numpy()).hurst)
    with pytest.raises(InvalidInputError, match="dt must be positive"):
        fit_fgn(good, dt=0.0)
    with pytest.raises(HurstRangeError):
        hurst_log_likelihood(1.0, good)
