"""The linear form in Pyro: its prior is the kernel, and stock inference finds the exact posterior."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import stochdyn as sd
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import (
    RVGP,
    AmbientKernel,
    ConnectionMatern,
    LinearField,
    PointCloud,
    ProjectedMatern,
    sample_field,
)
from tests.vectorfields.shapes import random_sphere


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    return PointCloud(random_sphere(150), 12, dim=2)


@pytest.mark.parametrize("kind", [ConnectionMatern, ProjectedMatern])
def test_prior_covariance_is_the_kernel(cloud: PointCloud, kind: type) -> None:
    kernel = kind(cloud, num_eigenpairs=12)
    field = LinearField(kernel, range(20))
    columns = field(torch.eye(field.num_weights).double(), amplitude=2.0).flatten(1).detach()
    x = cloud.rows(range(20))
    torch.testing.assert_close(columns.mT @ columns, 4.0 * kernel(x, x).to_dense().detach())


def test_hyper_parameters_broadcast(cloud: PointCloud) -> None:
    kernel = ConnectionMatern(cloud, num_eigenpairs=12)
    field = LinearField(kernel, [3, 4])
    weights = torch.randn(5, 12).double()
    kappa = torch.linspace(0.3, 1, 5).double()
    many = field(weights, kappa, kappa, 2.0 + kappa)
    for i in range(5):
        one = field(weights[i], kappa[i], kappa[i], 2.0 + kappa[i])
        torch.testing.assert_close(many[i], one)
    kernel.lengthscale = 0.7
    torch.testing.assert_close(field(weights, 0.7), field(weights).detach())


def data(cloud: PointCloud, q: int) -> torch.Tensor:
    spin = torch.linalg.cross(torch.tensor([[0.3, -0.4, 1.0]]).double().expand(q, 3), cloud.points[:q])
    generator = torch.Generator().manual_seed(0)
    return cloud.sites(range(q)).to_tangent(spin) + 0.2 * torch.randn(
        q, 2, generator=generator, dtype=torch.float64
    )


def test_variational_inference_finds_the_exact_posterior(cloud: PointCloud) -> None:
    kernel = ConnectionMatern(cloud, num_eigenpairs=8)
    y = data(cloud, 40)
    gp = RVGP(cloud, kernel).fit(
        range(40),
        cloud.sites(range(40)).to_ambient(y),
        optimize=False,
        learn_noise=False,
        noise_variance=0.04,
    )
    field = LinearField(kernel, range(40))

    def model() -> None:
        v = sample_field("v", field, amplitude=math.sqrt(gp.amplitude))
        pyro.sample("y", dist.Normal(v, 0.2).to_event(2), obs=y)

    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model, init_scale=0.1)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), elbo)
    for _ in range(400):
        svi.step()
    law = guide.get_posterior()
    root = gp.amplitude**0.5 * kernel.spectral_weights().detach().sqrt()
    exact = gp.engine.posterior
    spread = exact.root.norm(dim=1)
    assert ((law.mean.detach() * root - exact.mean[:, 0]) / spread).abs().max() < 0.15
    torch.testing.assert_close(
        law.covariance_matrix.detach().diagonal().sqrt() * root, spread, rtol=0.15, atol=0
    )
    bound = -Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    assert gp.log_marginal_likelihood() - 0.3 < bound < gp.log_marginal_likelihood() + 0.1
    idata = sd.to_inference_data(model, guide, num_draws=50)
    assert idata.posterior["v"].shape == (1, 50, 40, 2)


@pytest.mark.slow
def test_nuts_over_hyper_parameters_agrees_with_the_evidence(cloud: PointCloud) -> None:
    """Weights integrated out by sampling: the posterior of the noise is the one that quadrature of the evidence gives."""
    kernel = ConnectionMatern(cloud, num_eigenpairs=6)
    y = data(cloud, 25)
    field = LinearField(kernel, range(25))

    def model() -> None:
        noise = pyro.sample("noise", dist.LogNormal(torch.tensor(math.log(0.3)).double(), 0.7))
        v = sample_field("v", field)
        pyro.sample("y", dist.Normal(v, noise).to_event(2), obs=y)

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=250, warmup_steps=120, disable_progbar=True)
    mcmc.run()
    drawn = mcmc.get_samples()["noise"]
    grid = torch.linspace(math.log(0.1), math.log(0.5), 200).double()
    gp = RVGP(cloud, kernel)
    log = []
    for value in grid:
        gp.fit(
            range(25),
            cloud.sites(range(25)).to_ambient(y),
            optimize=False,
            learn_noise=False,
            noise_variance=math.exp(2 * value),
        )
        gp.engine.log_amplitude.data.fill_(0.0)
        log.append(gp.log_marginal_likelihood() - 0.5 * ((value - math.log(0.3)) / 0.7) ** 2)
    weight = torch.softmax(torch.stack(log), 0)
    mean = (weight * grid.exp()).sum()
    spread = ((weight * grid.exp() ** 2).sum() - mean**2).sqrt()
    assert abs(drawn.mean() - mean) < 5 * spread / math.sqrt(100)


def test_only_spectral_kernels(cloud: PointCloud) -> None:
    with pytest.raises(InvalidInputError, match="spectral"):
        LinearField(AmbientKernel(cloud), [0])
