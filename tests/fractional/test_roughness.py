"""Roughness under errors and averages: covariances, likelihood, recovery, and the bias of leaving either out."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from scipy import integrate
from torch import Tensor

from stochdyn.errors import (
    EmptyDataError,
    HurstRangeError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TooFewDrawsError,
)
from stochdyn.fractional import (
    averaged_autocovariance,
    fbm_covariance,
    infer_roughness,
    rough_volatility,
    roughness_model,
    sample_fbm,
)

F64 = torch.float64


@pytest.mark.parametrize("hurst", [0.1, 0.5, 0.8])
def test_averaged_increments_have_the_covariance_of_the_double_integral(hurst: float) -> None:
    def covariance(s: float, t: float) -> float:
        return 0.5 * (s ** (2 * hurst) + t ** (2 * hurst) - abs(s - t) ** (2 * hurst))

    def of_averages(i: int, j: int) -> float:
        value, _ = integrate.dblquad(covariance, i, i + 1, j, j + 1, epsabs=1e-9)
        return value

    got = averaged_autocovariance(4, hurst)
    for lag in (1, 2, 3):
        want = of_averages(1, lag + 1) - of_averages(1, lag) - of_averages(0, lag + 1) + of_averages(0, lag)
        assert float(got[lag]) == pytest.approx(want, abs=2e-5)


def test_averaged_autocovariance_scales_and_differentiates() -> None:
    one, fine = averaged_autocovariance(5, 0.3), averaged_autocovariance(5, 0.3, 0.1)
    torch.testing.assert_close(fine, one * 0.1**0.6)
    h = torch.tensor([0.1, 0.6], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: averaged_autocovariance(6, x, 0.5), (h,))
    assert torch.autograd.gradgradcheck(lambda x: averaged_autocovariance(6, x, 0.5), (h,))


def test_the_simulated_averages_have_that_covariance() -> None:
    days, inside = 4, 400
    path = sample_fbm(
        0.2, days * inside, horizon=float(days), size=(4000,), generator=torch.Generator().manual_seed(0)
    )
    averages = path[:, 1:].double().reshape(-1, days, inside).mean(-1)
    products = averages.diff(dim=-1)
    want = averaged_autocovariance(3, 0.2)
    for lag in range(3):
        terms = products[:, 0] * products[:, lag]
        assert abs(float(terms.mean() - want[lag])) < 5 * float(terms.std()) / math.sqrt(4000) + 2e-3


@pytest.mark.parametrize("averaged", [False, True])
def test_the_likelihood_is_that_of_the_noisy_path(averaged: bool) -> None:
    n, hurst, scale, noise, step = 12, 0.3, 0.7, 0.4, 0.5
    y = torch.randn(n, dtype=F64)
    increments = y.diff()
    spread = increments.std()
    # Independently of the model: the covariance of the levels, differenced by a matrix.
    if averaged:
        lag = (torch.arange(n - 1)[:, None] - torch.arange(n - 1)).abs()
        clean = averaged_autocovariance(n, hurst, step)[lag]
    else:
        levels = fbm_covariance(torch.arange(n, dtype=F64) * step, hurst)
        d = torch.eye(n, dtype=F64)[1:] - torch.eye(n, dtype=F64)[:-1]
        clean = d @ levels @ d.mT
    d = torch.eye(n, dtype=F64)[1:] - torch.eye(n, dtype=F64)[:-1]
    covariance = scale**2 * clean + noise**2 * d @ d.mT + spread**2
    want = torch.distributions.MultivariateNormal(torch.zeros(n - 1, dtype=F64), covariance).log_prob(
        increments
    )
    values = {
        "hurst_probit": torch.special.ndtri(torch.tensor(hurst, dtype=F64)),
        "deviation": scale * clean[0, 0].sqrt(),
    }
    values["noise_scale"] = torch.tensor(noise, dtype=F64)
    trace = pyro.poutine.trace(pyro.condition(roughness_model, values)).get_trace(
        increments, step, None, averaged
    )
    assert float(trace.nodes["increments"]["fn"].log_prob(increments)) == pytest.approx(float(want), rel=1e-9)


def posterior(path: Tensor, **options: object) -> tuple[float, float]:
    hurst = infer_roughness(path, num_draws=200, **options).posterior["hurst"]  # type: ignore[arg-type]
    return float(hurst.mean()), float(hurst.std())


def test_errors_and_averages_each_bias_the_naive_answer_and_the_model_mends_both() -> None:
    series = rough_volatility(300, 0.1, generator=torch.Generator().manual_seed(3))
    realised, integrated = series.realised.log(), series.integrated.log()
    error = math.sqrt(2 / 78)
    mean, std = posterior(realised, noise_scale=error, averaged=True)
    assert abs(mean - 0.1) < 3 * std
    assert std < 0.08
    # Averaged over the day and taken for a sample: far too smooth.
    mean, std = posterior(integrated, noise_scale=0.0)
    assert mean - 0.1 > 4 * std
    # Averages understood but errors left out: too rough.
    without, _ = posterior(realised, noise_scale=0.0, averaged=True)
    assert without < 0.06


def test_draws_agree_with_quadrature_over_the_exact_posterior() -> None:
    path = sample_fbm(0.4, 60, horizon=60.0, generator=torch.Generator().manual_seed(1)).double()
    idata = infer_roughness(path, noise_scale=0.0, num_draws=1000)
    increments = path.diff()
    hursts = torch.linspace(0.02, 0.98, 49, dtype=F64)
    deviations = torch.linspace(0.6, 1.7, 30, dtype=F64) * float(increments.std())
    log_joint = torch.empty(49, 30, dtype=F64)
    for j, deviation in enumerate(deviations):
        for i, h in enumerate(hursts):
            values = {"hurst_probit": torch.special.ndtri(h), "deviation": deviation}
            trace = pyro.poutine.trace(pyro.condition(roughness_model, values)).get_trace(
                increments, 1.0, 0.0
            )
            # The prior of the probit is the uniform one of the index: leave out what the change of variable adds.
            prior = trace.nodes["hurst_probit"]["fn"].log_prob(values["hurst_probit"])
            log_joint[i, j] = trace.log_prob_sum() - prior
    weight = torch.softmax(log_joint.flatten(), 0).reshape(49, 30)
    exact = float((weight.sum(1) * hursts).sum())
    spread = float((weight.sum(1) * (hursts - exact) ** 2).sum().sqrt())
    draws = idata.posterior["hurst"]
    # 2000 proposals and 1000 resampled draws: five standard errors are about 0.2 posterior deviations.
    assert abs(float(draws.mean()) - exact) < 0.2 * spread
    assert float(draws.std()) == pytest.approx(spread, rel=0.15)
    assert idata.attrs["khat"] < 0.7
    assert {"hurst", "deviation", "scale"} == set(idata.posterior.data_vars)


@pytest.mark.slow
def test_intervals_cover_at_the_right_rate() -> None:
    hits = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        path = sample_fbm(0.2, 250, horizon=250.0, generator=generator).double()
        path = path + 0.3 * torch.randn(251, generator=generator, dtype=F64)
        draws = infer_roughness(path, num_draws=200, seed=seed).posterior["hurst"].values
        low, high = torch.quantile(torch.as_tensor(draws).flatten(), torch.tensor([0.05, 0.95], dtype=F64))
        hits += bool(low < 0.2 < high)
    # Binomial(40, 0.9): fewer than 30 has a probability of 0.002.
    assert hits >= 30


def test_realised_variance_estimates_the_integrated_one() -> None:
    series = rough_volatility(2000, 0.1, returns_a_day=50, generator=torch.Generator().manual_seed(0))
    ratio = series.realised / series.integrated
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(2000)
    # log RV has a standard error of sqrt(2/M), a little more since the variance moves within the day.
    assert math.sqrt(2 / 50) < float(ratio.log().std()) < 1.3 * math.sqrt(2 / 50)


def test_bad_input_is_refused() -> None:
    good = torch.randn(40).cumsum(0)
    with pytest.raises(EmptyDataError):
        infer_roughness(torch.empty(0))
    with pytest.raises(TooFewDrawsError):
        infer_roughness(good[:10])
    with pytest.raises(ShapeError):
        infer_roughness(good[None])
    with pytest.raises(NonFiniteError):
        infer_roughness(torch.cat([good, torch.tensor([math.nan])]))
    for wrong in ({"noise_scale": -0.1}, {"step": 0.0}, {"num_draws": 0}):
        with pytest.raises(InvalidInputError):
            infer_roughness(good, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="straight"):
        infer_roughness(torch.arange(40.0))
    with pytest.raises(HurstRangeError):
        rough_volatility(10, 1.0)
    with pytest.raises(InvalidInputError):
        rough_volatility(10, returns_a_day=0)
