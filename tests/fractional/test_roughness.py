"""Roughness under errors and averages: covariances, likelihood, recovery, and the bias of leaving either out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from stochdyn.errors import (
    HurstRangeError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    StochdynWarning,
    TooFewDrawsError,
)
from stochdyn.fractional import (
    averaged_autocovariance,
    fbm_covariance,
    fgn_autocovariance,
    infer_hurst,
    infer_roughness,
    rough_volatility,
    sample_fbm,
    sample_fgn,
)
from stochdyn.fractional.hurst import Law

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
        0.2,
        days * inside,
        horizon=float(days),
        sample_shape=(4000,),
        generator=torch.Generator().manual_seed(0),
    )
    averages = path[:, 1:].double().reshape(-1, days, inside).mean(-1)
    products = averages.diff(dim=-1)
    want = averaged_autocovariance(3, 0.2)
    for lag in range(3):
        terms = products[:, 0] * products[:, lag]
        assert abs(float(terms.mean() - want[lag])) < 5 * float(terms.std()) / math.sqrt(4000) + 2e-3


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("regular", [False, True])
def test_the_law_of_increments_is_that_of_the_noisy_path(averaged: bool, regular: bool) -> None:
    """Covariance of the levels (of averages by a double integral), differenced by a matrix, errors added."""
    hurst, share = 0.3, 0.4
    law = Law("errors", 1.0 if averaged else 0.0)
    times = np.arange(6.0) if regular else np.array([0.0, 1.0, 2.5, 3.0, 5.0, 6.5])
    if averaged:

        def level(s: float, t: float) -> float:
            kernel = lambda u, v: abs(s - u) ** 0.6 + abs(t - v) ** 0.6 - abs(s - u - t + v) ** 0.6  # noqa: E731
            return 0.5 * integrate.dblquad(kernel, 0, 1, 0, 1, epsabs=1e-8)[0]

        levels = np.array([[level(s, t) for t in times + 2] for s in times + 2])
    else:
        levels = fbm_covariance(torch.as_tensor(times + 1), hurst).numpy()
    d = np.eye(6)[1:] - np.eye(6)[:-1]
    one = law.pure(1, np.array([hurst]))[0, 0]
    want = (1 - share) * d @ levels @ d.T / one + share * d @ d.T / 2
    got = law.covariances(times, np.array([hurst]), np.array([share]), True)[0]
    assert np.abs(got - want).max() < 1e-4
    if regular:
        row = law.correlations(5, np.array([hurst]), np.array([share]))[0]
        assert np.abs(got[0] - row).max() < 1e-9


def posterior(path: Tensor, **options: object) -> tuple[float, float]:
    hurst = infer_roughness(path, num_draws=500, **options).posterior["hurst"]  # type: ignore[arg-type]
    return float(hurst.mean()), float(hurst.std())


def test_errors_and_averages_each_bias_the_naive_answer_and_the_model_mends_both() -> None:
    series = rough_volatility(300, 0.1, generator=torch.Generator().manual_seed(3))
    realised, integrated = series.realised.log(), series.integrated.log()
    error = math.sqrt(2 / 78)
    mean, std = posterior(realised, obs_scale=error, averaged=True)
    assert abs(mean - 0.1) < 3 * std
    assert std < 0.08
    # Averaged over the day and taken for a sample: far too smooth.
    mean, std = posterior(integrated, obs_scale=0.0)
    assert mean - 0.1 > 4 * std
    # Averages understood but errors left out: too rough.
    with pytest.warns(StochdynWarning, match="within 0.02 of 0"):
        without, _ = posterior(realised, obs_scale=0.0, averaged=True)
    assert without < 0.06


@pytest.mark.parametrize("known", [True, False])
def test_draws_agree_with_brute_force(known: bool) -> None:
    """Inverse matrices on a grid of H and share of the errors; drift flat, scale 1 / scale or fixed by the errors."""
    generator = torch.Generator().manual_seed(1)
    path = sample_fbm(0.4, 60, horizon=60.0, generator=generator) + 0.5 * torch.randn(
        61, generator=generator, dtype=F64
    )
    eta = 0.5
    idata = infer_roughness(path, obs_scale=eta if known else None, num_draws=4000)
    y, n = path.diff().numpy(), 60
    lag = np.abs(np.arange(n)[:, None] - np.arange(n))
    errors = np.eye(n) - 0.5 * (lag == 1)
    hursts = np.linspace(0.01, 0.99, 50)
    log_d = np.linspace(-3, 3, 61)  # deviation without errors
    shares = 2 * eta**2 / (np.exp(2 * log_d) + 2 * eta**2) if known else (np.arange(60) + 0.5) / 60
    log_p = np.empty((len(hursts), len(shares)))
    for i, h in enumerate(hursts):
        r = fgn_autocovariance(n, float(h)).numpy()[lag]
        for j, f in enumerate(shares):
            v = (1 - f) * r + f * errors
            inverse, (_, log_det) = np.linalg.inv(v), np.linalg.slogdet(v)
            p = inverse.sum()
            q = y @ inverse @ y - (inverse @ y).sum() ** 2 / p
            if known:
                s2 = 2 * eta**2 / f
                log_p[i, j] = -0.5 * (log_det + np.log(p) + (n - 1) * np.log(s2) + q / s2)
            else:
                log_p[i, j] = -0.5 * (log_det + np.log(p) + (n - 1) * np.log(q))
    weight = np.exp(log_p - log_p.max()).sum(1)
    weight /= weight.sum()
    exact = float(weight @ hursts)
    spread = float(weight @ (hursts - exact) ** 2) ** 0.5
    draws = idata.posterior["hurst"]
    assert abs(float(draws.mean()) - exact) < 0.12 * spread
    assert float(draws.std()) == pytest.approx(spread, rel=0.08)
    assert {"hurst", "deviation", "scale", "drift"} <= set(idata.posterior.data_vars)


@pytest.mark.parametrize("errors", [None, 0.0, 0.3])
def test_a_drift_changes_nothing(errors: float | None) -> None:
    path = sample_fbm(0.3, 120, horizon=120.0, generator=torch.Generator().manual_seed(0))
    moved = path + 1e5 + 100.0 * torch.arange(121, dtype=F64)
    here, there = (
        infer_roughness(x, obs_scale=errors, num_draws=200).posterior["hurst"].values for x in (path, moved)
    )
    assert np.abs(here - there).max() < 1e-6


@pytest.mark.parametrize("errors", [None, 0.3])
def test_irregular_times_may_be_in_any_unit(errors: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    path, n = sample_fbm(0.3, 90, horizon=90.0, generator=g), torch.arange(91, dtype=F64)
    keep = torch.rand(91, generator=g) < 0.7
    first, *others = (
        infer_roughness(path[keep], obs_scale=errors, num_draws=100, times=n[keep] * unit + start).posterior
        for unit, start in ((1.0, 0.0), (2.0**20, 1e9), (2.0**-30, 0.0))
    )
    for other, unit in zip(others, (2.0**20, 2.0**-30), strict=True):
        assert np.abs(other["hurst"].values - first["hurst"].values).max() < 1e-6
        rescaled = other["scale"].values * unit ** other["hurst"].values
        assert np.abs(rescaled / first["scale"].values - 1).max() < 1e-5


def test_increments_far_apart_may_be_in_any_unit_of_time() -> None:
    noise, n = sample_fgn(0.7, 91, generator=1), torch.arange(91, dtype=F64)
    keep = torch.rand(91, generator=torch.Generator().manual_seed(0)) < 0.7
    one, other = (
        infer_hurst(noise[keep], num_draws=100, times=n[keep] * unit).posterior["hurst"].values
        for unit in (1.0, 2.0**20)
    )
    assert np.abs(one - other).max() < 1e-6
    # increments that last a millionth of what lies between them are all but independent, and no failure of the algebra
    far = infer_hurst(noise[keep], dt=1e-6, num_draws=100, times=n[keep])
    assert np.isfinite(far.posterior["hurst"].values).all()


def _tracks(count: int, hurst: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(11)
    found = []
    for k in range(count):
        n = 5 + (7 * k) % 40
        x = sample_fbm(hurst, n - 1, horizon=float(n - 1), sample_shape=2, generator=g).T
        x = x + torch.tensor([0.2, 0.5], dtype=F64) * torch.randn(n, 2, generator=g, dtype=F64)
        found.append(x + torch.arange(n, dtype=F64)[:, None] * torch.randn(2, generator=g, dtype=F64))
    return found


def test_short_tracks_in_the_plane_share_index_scale_and_error_of_each_axis() -> None:
    tracks = _tracks(30, 0.35)
    idata = infer_roughness(tracks, num_draws=1000)
    hurst = idata.posterior["hurst"]
    assert abs(float(hurst.mean()) - 0.35) < 3.5 * float(hurst.std())
    assert float(hurst.std()) < 0.08
    for name, truth in (("obs_scale", [0.2, 0.5]), ("scale", [1.0, 1.0])):
        draws = idata.posterior[name].values[0]
        assert (np.abs(draws.mean(0) - truth) < 3.5 * draws.std(0)).all()
    assert idata.posterior["drift"].shape == (1, 1000, 30, 2)
    known = infer_roughness(tracks, obs_scale=[0.2, 0.5], num_draws=1000).posterior["hurst"]
    assert float(known.std()) < float(hurst.std())
    # the order of tracks says nothing
    again = infer_roughness(tracks[::-1], num_draws=1000).posterior["hurst"]
    assert abs(float(again.mean() - hurst.mean())) < 0.2 * float(hurst.std())


def test_gaps_in_a_path_and_tracks_with_an_index_each() -> None:
    tracks = _tracks(4, 0.35)
    tracks[1][2] = math.nan
    idata = infer_roughness(tracks, hierarchy=True, num_draws=200)
    assert idata.posterior["hurst"].shape == (1, 200, 4)
    assert idata.posterior["scale"].shape == (1, 200, 4, 2)


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
    series = rough_volatility(2000, 0.1, returns_per_day=50, generator=torch.Generator().manual_seed(0))
    ratio = series.realised / series.integrated
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(2000)
    # log RV has a standard error of sqrt(2/M), a little more since the variance moves within the day.
    assert math.sqrt(2 / 50) < float(ratio.log().std()) < 1.3 * math.sqrt(2 / 50)


def test_bad_input_is_refused() -> None:
    good = torch.randn(40).cumsum(0)
    with pytest.raises(TooFewDrawsError):
        infer_roughness(torch.empty(0))
    with pytest.raises(TooFewDrawsError):
        infer_roughness(good[:10])
    with pytest.raises(ShapeError):
        infer_roughness(good[None, None])
    with pytest.raises(NonFiniteError):
        infer_roughness(torch.cat([good, torch.tensor([math.inf])]))
    for wrong in (
        {"obs_scale": -0.1}, {"obs_scale": math.inf}, {"obs_scale": [1.0, 2.0]}, {"dt": 0.0}, {"num_draws": 0}, {"averaged": 2.0},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            infer_roughness(good, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="straight"):
        infer_roughness(torch.arange(40.0))
    with pytest.raises(HurstRangeError):
        rough_volatility(10, 1.0)
    with pytest.raises(InvalidInputError):
        rough_volatility(10, returns_per_day=0)
