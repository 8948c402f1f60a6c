"""Bootstrap, linear response and SVI against refits, exact derivatives and each other; identifiability; forecasts."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import (
    Adam,
    BridgeProfile,
    FullRefit,
    LinearDrift,
    LinearResponse,
    LotkaVolterra,
    NeuralDrift,
    Repressilator,
    Sinkhorn,
    Snapshots,
    bootstrap,
    families_of,
    fit_profile,
    forecast,
    posterior,
    refine,
    rotation_invariance,
)
from stochdyn.bridges.data.snapshots import redrawn_weights
from stochdyn.bridges.refinement import flatten, parameter_jacobian, with_coordinates
from stochdyn.bridges.refinement.profile import _Profile
from stochdyn.errors import UnavailableError

F64 = torch.float64


def snapshots(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    times = torch.tensor([0.0, 0.75, 1.5, 3.0], dtype=F64)
    decay = torch.exp(-0.8 * times)
    std = (0.04 * decay**2 + 0.25 / 1.6 * (1 - decay**2)).sqrt()
    clouds = [
        1 + 2 * d + s * torch.randn(n, 1, dtype=F64, generator=g) for d, s in zip(decay, std, strict=True)
    ]
    return Snapshots(times, clouds)


@pytest.fixture(scope="module")
def fit():
    return refine(
        snapshots(),
        LinearDrift(1),
        diffusion=0.5,
        max_iterations=30,
        tolerance=1e-05,
        dt=0.1,
        method=Sinkhorn(num_nodes=20000),
    )


@pytest.fixture(scope="module")
def response(fit):
    return LinearResponse(fit)


def test_the_response_follows_refits_to_first_order(fit, response):
    g = torch.Generator().manual_seed(1)
    weights = redrawn_weights(fit.snapshots, 6, g)
    # a small step from equal weights towards a redrawing, so that the second order is small
    small = [0.9 * own + 0.1 * w for own, w in zip(fit.snapshots.weights, weights, strict=True)]
    found = response(small)
    for b in range(3):
        again = Snapshots(fit.snapshots.times, fit.snapshots.samples, [w[b] for w in small])
        exact = flatten(
            refine(
                again,
                fit.family,
                diffusion=0.5,
                max_iterations=30,
                tolerance=1e-06,
                dt=0.1,
                method=Sinkhorn(from_family=True),
            ).family
        )
        moved = (exact - response.converged).norm()
        assert (found[b] - exact).norm() < 0.12 * moved + 1e-4


def test_the_rate_of_the_iteration_is_the_missing_information(response):
    # the exact iteration of this process contracts at about 0.15 to 0.2 near its fixed point
    rates = torch.linalg.eigvals(response.jacobian).real
    assert rates.min() > -0.05
    assert 0.05 < rates.max() < 0.5
    kept = response.information_kept
    assert torch.allclose((1 - kept).sort().values, rates.sort().values, atol=0.03)


@pytest.mark.slow
def test_the_bootstrap_is_as_wide_as_estimates_scatter(fit):
    idata = bootstrap(fit, 300)
    draws = torch.as_tensor(idata.posterior["matrix"].values.copy()).flatten()
    truth = torch.stack(
        [
            refine(
                snapshots(seed=s),
                LinearDrift(1),
                diffusion=0.5,
                max_iterations=6,
                tolerance=0.001,
                dt=0.1,
                method=Sinkhorn(num_nodes=5000),
            )
            .parameters["matrix"]
            .flatten()
            for s in range(100, 116)
        ]
    )
    ratio = draws.std() / truth.std()
    assert 1 / 1.9 < ratio < 1.9  # 16 estimates know their spread to a factor of 1.2 at one standard error
    assert idata.attrs["estimator"] == "bootstrap"
    assert idata.attrs["refit"] == "linear"


@pytest.mark.slow
def test_full_refits_agree_with_the_response(fit):
    full = bootstrap(fit, 10, seed=2, refit=FullRefit(6, 5000))
    linear = bootstrap(fit, 200, seed=2)
    a, b = (torch.as_tensor(i.posterior["shift"].values.copy()).flatten() for i in (full, linear))
    assert abs(a.mean() - b.mean()) < 5 * b.std() / 10**0.5
    assert 0.45 < a.std() / b.std() < 2.0
    assert full.attrs["refit"] == "full"
    assert full.attrs["failed"] == 0


def test_centring_moves_draws_by_twice_the_bias(fit):
    plain, centred = (bootstrap(fit, 50, centre=c).posterior["coordinates"].values[0] for c in (False, True))
    shift = torch.as_tensor(centred - plain)
    assert torch.allclose(shift, shift[:1].expand_as(shift))
    bias = torch.as_tensor(plain.mean(0)) - LinearResponse(fit).converged
    assert torch.allclose(shift[0], -2 * bias)


def test_families_of_a_posterior(fit):
    idata = posterior(fit, 20)
    families = families_of(fit, idata)
    assert len(families) == 20
    first = torch.as_tensor(idata.posterior["matrix"].values[0, 0].copy())
    assert torch.allclose(families[0].named_values()["matrix"], first)
    other = refine(snapshots(), LinearDrift(1, shift=False), diffusion=0.5, max_iterations=1)
    with pytest.raises(sd.errors.InvalidInputError, match="another family"):
        families_of(other, idata)


def test_forecasts_carry_the_uncertainty_of_the_parameters(fit):
    idata = posterior(fit, 200)
    ts = torch.tensor([3.0, 6.0], dtype=F64)
    plain = forecast(fit, ts, 4000, torch.Generator().manual_seed(0))
    wide = forecast(fit, ts, 4000, torch.Generator().manual_seed(0), posterior=idata)
    assert wide.x.shape == plain.x.shape
    assert wide.x[:, 1].std() > plain.x[:, 1].std() * 1.005


def test_the_container_is_arviz_s(fit):
    az = pytest.importorskip("arviz")
    summary = az.summary(posterior(fit, 60), var_names=["shift"])
    assert len(summary) == 1


def test_the_gradient_of_the_profile(fit):
    profile = BridgeProfile(fit)
    theta = flatten(fit.family) + torch.tensor([0.2, -0.1], dtype=F64)
    _, gradient = profile.evaluate(theta)
    for k in range(2):
        e = torch.zeros(2, dtype=F64)
        e[k] = 1e-3
        numeric = (profile.evaluate(theta + e)[0] - profile.evaluate(theta - e)[0]) / 2e-3
        assert abs(gradient[k] - numeric) < 2e-3 * gradient.abs().max()


def test_the_profile_has_no_second_derivatives(fit):
    profile = BridgeProfile(fit)
    theta = flatten(fit.family).requires_grad_()
    value = torch.cos(_Profile.apply(theta, profile))
    (slope,) = torch.autograd.grad(value, theta, create_graph=True)
    with pytest.raises(UnavailableError, match="first derivatives alone"):
        torch.autograd.grad(slope.sum(), theta)


def test_the_curvature_of_the_profile_is_the_observed_information(fit, response):
    profile = BridgeProfile(fit)
    columns = []
    for k in range(2):
        e = torch.zeros(2, dtype=F64)
        e[k] = 1e-2
        columns.append(
            (profile.evaluate(response.converged + e)[1] - profile.evaluate(response.converged - e)[1]) / 2e-2
        )
    curvature = torch.stack(columns, -1)
    assert torch.allclose(
        curvature, response.observed, rtol=0.1, atol=0.02 * float(response.observed.abs().max())
    )


def test_svi_draws_and_weights(fit):
    idata = posterior(fit, 30, "svi", steps=4)
    assert idata.attrs["estimator"] == "svi"
    assert 0 < idata.attrs["temper"] <= 1
    wide = bootstrap(fit, 200)
    for name in ("matrix", "shift"):
        a, b = (torch.as_tensor(i.posterior[name].values.copy()).flatten() for i in (idata, wide))
        assert abs(a.mean() - b.mean()) < b.std() + a.std()
        assert 0.3 < a.std() / b.std() < 3.0
    weights = torch.as_tensor(idata.sample_stats["log_weight"].values.copy()).flatten()
    assert weights.std() < 1.5  # the guide is near the posterior
    assert len(families_of(fit, idata)) == 30


def test_a_profile_fit_goes_on_where_it_stopped(fit, tmp_path):
    whole = fit_profile(fit, steps=3, num_particles=1)
    fit_profile(fit, steps=1, num_particles=1, checkpoint=tmp_path)
    again = fit_profile(fit, steps=3, num_particles=1, checkpoint=tmp_path, resume=True)
    assert again.losses == whole.losses
    assert torch.equal(again.guide.loc, whole.guide.loc)
    assert torch.equal(again.guide.scale_tril, whole.guide.scale_tril)
    with pytest.raises(sd.errors.ForeignCheckpointError):
        fit_profile(fit, steps=3, num_particles=2, checkpoint=tmp_path, resume=True)


def test_a_prior_acts():
    def model():
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.02))
        mean = pyro.sample("mean", dist.Normal(torch.tensor(1.0, dtype=F64), 1.0))
        return lambda t, x: rate * (mean - x)

    strong = refine(
        snapshots(12), model, diffusion=0.5, max_iterations=2, dt=0.4, method=Sinkhorn(num_nodes=3000)
    )
    assert abs(strong.parameters["rate"].log().item() + 1.0) < 0.1
    result = fit_profile(strong, steps=1, num_particles=1)
    draws = torch.as_tensor(result.posterior(5).posterior["rate"].values.copy()).flatten()
    assert abs(draws.log().mean() + 1.0) < 0.1
    with pytest.raises(sd.errors.InvalidInputError, match="prior"):
        LinearResponse(strong)


def test_derivatives_in_the_parameters():
    family = Repressilator().double()
    t, x = torch.zeros(5, 1, dtype=F64), torch.rand(5, 3, dtype=F64) + 0.2
    value, slope = parameter_jacobian(family, t, x)
    theta = flatten(family)
    assert torch.allclose(value, family(t, x))
    for k in range(4):
        e = torch.zeros(4, dtype=F64)
        e[k] = 1e-6
        numeric = (
            with_coordinates(family, theta + e)(t, x) - with_coordinates(family, theta - e)(t, x)
        ) / 2e-6
        assert torch.allclose(slope[..., k], numeric, atol=1e-7)


def test_rotations_that_snapshots_cannot_show():
    g = torch.Generator().manual_seed(0)
    round_ones = [r * torch.randn(300, 2, generator=g, dtype=F64) for r in (1.0, 1.5, 2.0)]
    check = rotation_invariance(Snapshots([0.0, 1.0, 2.0], round_ones))
    assert check.invariant
    assert abs(abs(check.generator[0, 1]).item() - 1) < 1e-9
    moved = [x + torch.tensor([2.0 * k, 0.0], dtype=F64) for k, x in enumerate(round_ones)]
    assert not rotation_invariance(Snapshots([0.0, 1.0, 2.0], moved)).invariant
    long = [x * torch.tensor([2.0, 1.0], dtype=F64) for x in round_ones]
    assert not rotation_invariance(Snapshots([0.0, 1.0, 2.0], long)).invariant
    # equal second moments alone are not enough: a square of four points
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64).repeat(75, 1)
    square = square + 0.05 * torch.randn(300, 2, generator=g, dtype=F64)
    assert not rotation_invariance(Snapshots([0.0, 1.0], [square, 2 * square])).invariant
    # in three dimensions, round in one plane only
    disc = [
        torch.cat((x, k + torch.randn(300, 1, generator=g, dtype=F64) * 0.2), 1)
        for k, x in enumerate(round_ones)
    ]
    plane = rotation_invariance(Snapshots([0.0, 1.0, 2.0], disc))
    assert plane.invariant
    assert abs(plane.generator[0, 1]) > 0.95
    assert not rotation_invariance(snapshots()).invariant


def test_posteriors_warn_of_rotations():
    g = torch.Generator().manual_seed(0)
    still = [torch.randn(60, 2, generator=g, dtype=F64) for _ in range(3)]
    fit = refine(
        Snapshots([0.0, 1.0, 2.0], still), LinearDrift(2, shift=False), diffusion=1.0, max_iterations=3
    )
    with pytest.warns(sd.errors.ApproximationWarning, match="rotation"):
        posterior(fit, 3, refit=FullRefit(1))


def test_too_many_parameters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.errors.ApproximationWarning)
        fit = refine(
            snapshots(10),
            NeuralDrift(1, width=8),
            diffusion=0.5,
            max_iterations=1,
            dt=0.4,
            method=Sinkhorn(projection=Adam(steps=5)),
        )
    with pytest.raises(sd.errors.InvalidInputError, match="too many"):
        LinearResponse(fit)
    idata = bootstrap(fit, 2, refit=FullRefit(1))
    assert idata.attrs["refit"] == "full"
    with pytest.raises(sd.errors.InvalidInputError, match="method"):
        posterior(fit, 2, "mcmc")


@pytest.mark.slow
def test_intervals_of_lotka_volterra_cover_the_truth():
    truth = torch.tensor([1.0, 0.4, 0.4, 0.1], dtype=F64)
    covered = []
    for seed in range(20):
        data = sd.datasets.lotka_volterra(50, times=[0.0, 2.0, 4.0, 6.0, 8.0], generator=seed)
        fit = refine(
            Snapshots(data.times, data.samples),
            LotkaVolterra(),
            0.1,
            max_iterations=20,
            dt=0.1,
            tolerance=0.02,
        )
        draws = torch.as_tensor(bootstrap(fit, 200, centre=True).posterior["coordinates"].values[0].copy())
        low, high = draws.quantile(0.05, 0), draws.quantile(0.95, 0)
        covered.append((low <= truth) & (truth <= high))
    # 80 intervals of 90 %: fewer than 80 % of them would be two and a half standard errors down
    assert torch.stack(covered).double().mean() >= 0.8


def test_particles_of_weight_zero_are_no_observations():
    cloud, weights = torch.zeros(30, 1), torch.cat([torch.ones(10), torch.zeros(20)])
    snaps = Snapshots([0.0, 1.0], [cloud, cloud], [weights, weights])
    assert snaps.mean_count == 10
    for drawn in redrawn_weights(snaps, 50, torch.Generator().manual_seed(0)):
        times = 10 * drawn
        torch.testing.assert_close(times, times.round(), atol=1e-5, rtol=0)
        assert drawn[:, 10:].abs().max() == 0
