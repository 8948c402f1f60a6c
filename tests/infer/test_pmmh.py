"""Particle-marginal chains have the exact posterior of a linear model, whatever the number of particles."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError, ZeroProbabilityError
from stochdyn.infer import LinearObservations, ParticleObservations, PMMHMethod, fit_posterior
from tests.infer.exact import F64

TIMES = torch.tensor([0.3, 0.5, 1.2, 2.0], dtype=F64)
Y = torch.tensor([[0.7], [0.4], [float("nan")], [-0.1]], dtype=F64)
X0 = torch.ones(1, dtype=F64)


def model(y, method="bootstrap", num_particles=60, obs_scale=0.3):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.7))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.6)
    pyro.sample(
        "y",
        ParticleObservations(
            sde,
            X0,
            TIMES,
            lambda x: dist.Normal(x, obs_scale).to_event(1),
            num_particles,
            method=method,
            dt=0.4,
        ),
        obs=y,
    )


def exact():
    """Return mean and standard deviation of the log rate by quadrature over the exact evidence of the Euler chain."""
    grid = torch.linspace(-3.5, 3.0, 1501, dtype=F64)
    sde = sd.SDE(lambda t, x: -grid.exp()[:, None] * x, 0.6)
    site = sd.infer.NonlinearObservations(sde, X0, TIMES, lambda x: x, 0.3, dt=0.4)
    weight = (site.log_prob(Y) + dist.Normal(0.0, 0.7).log_prob(grid)).softmax(0)
    mean = (weight * grid).sum()
    return float(mean), float((weight * (grid - mean) ** 2).sum().sqrt())


@pytest.mark.parametrize("method", ["bootstrap", pytest.param("guided", marks=pytest.mark.slow)])
def test_chains_have_the_exact_posterior(method):
    mean, sd_ = exact()
    short = {"num_draws": 150} if method == "guided" else {"num_draws": 250}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        post = fit_posterior(
            lambda y: model(y, method),
            Y,
            method=PMMHMethod(warmup=60, num_chains=16),
            progress=False,
            **short,
        )
    found = torch.as_tensor(post.idata.posterior["rate"].values).log()
    assert found.shape == (16, short["num_draws"])
    assert post.rhat < 1.1
    assert post.ess > 100
    assert abs(float(found.mean()) - mean) < 5 * sd_ / post.ess**0.5
    assert abs(float(found.std()) / sd_ - 1) < 5 / (2 * post.ess) ** 0.5
    # What the chains kept stands in the container, and predictions come from the draws.
    assert post.idata.log_likelihood["y"].shape == (16, short["num_draws"])
    assert bool((post.idata.log_likelihood["y"].values != 0).all())
    assert post.idata.posterior_predictive["y"].shape[2:] == (4, 1)
    assert post.idata.attrs["num_particles"] >= 10
    assert 0.05 < post.idata.attrs["acceptance"] < 0.7


def test_the_number_of_particles_follows_the_variance_of_the_estimate():
    from stochdyn.infer.pmmh import _Target, _tuned

    pyro.set_rng_seed(0)
    target = _Target(model, (Y, "bootstrap", 10, 0.03), {}, 10)
    with torch.no_grad():
        point = torch.zeros(1, dtype=F64)
        target.particles = 200
        count = _tuned(target, point)
        target.particles = count
        variance = float(target.at(point.expand(400, -1)).joint.var())
    # The variance of fifty estimates has a relative error of a fifth, and it isn't quite as one over the particles.
    assert 0.4 < variance < 3.5


def test_the_site_stands_in_plates_and_draws():
    rate = torch.tensor([0.5, 1.5], dtype=F64)
    sde = sd.SDE(lambda t, x: 1 - rate[:, None] * x.exp(), 0.2)
    site = ParticleObservations(sde, X0, TIMES, lambda x: dist.Poisson(x.exp()).to_event(1), 50, dt=0.1)
    assert (site.batch_shape, site.event_shape) == ((2,), (4, 1))
    y = site.sample((3,))
    assert y.shape == (3, 2, 4, 1)
    assert site.expand([3, 2]).log_prob(y).shape == (3, 2)
    assert bool((site.with_particles(None).log_prob(y) == 0).all())


def test_wrong_uses_are_told():
    with pytest.raises(InvalidInputError, match="ParticleObservations"):
        fit_posterior(lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), method="pmmh", progress=False)
    with pytest.raises(InvalidInputError, match="num_chains"):
        PMMHMethod(num_chains=1)
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    site = ParticleObservations(
        sd.SDE(lambda t, x: -rate * x, 0.6), X0, TIMES, lambda x: dist.Normal(x, 0.3).to_event(1)
    )
    with pytest.raises(UnavailableError, match="gradient"):
        site.log_prob(Y)
    with pytest.raises(ShapeError, match="data"):
        site.log_prob(Y[:2])


def test_impossible_data_are_told():
    def bounded(y):
        rate = pyro.sample("rate", dist.Uniform(torch.full((), 0.1, dtype=F64), 1.0))
        sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.6)
        site = ParticleObservations(
            sde, X0, TIMES, lambda x: dist.Uniform(x - 1, x + 1).to_event(1), 20, dt=1.0
        )
        pyro.sample("y", site, obs=y)

    far = torch.full((4, 1), 50.0, dtype=F64)
    with pytest.raises(ZeroProbabilityError, match="impossible"):
        fit_posterior(bounded, far, method=PMMHMethod(warmup=20), progress=False)


def test_the_oracle_is_the_linear_law_for_small_steps():
    """The quadrature's evidence tends to that of continuous time."""
    law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate=1.3, diffusion=0.6, initial_mean=X0)
    site = sd.infer.NonlinearObservations(
        sd.SDE(lambda t, x: -1.3 * x, 0.6), X0, TIMES, lambda x: x, 0.3, dt=0.002
    )
    want = LinearObservations(law, TIMES, 0.3).log_prob(Y)
    torch.testing.assert_close(site.log_prob(Y), want, atol=0.01, rtol=0)
