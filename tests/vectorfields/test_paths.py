"""Trajectories as data: the Girsanov likelihood is the regression's, and fields come back with calibrated bands."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError
from stochdyn.vectorfields import (
    RVGP,
    ConnectionMatern,
    PointCloud,
    TangentDiffusion,
    TangentDrift,
    cloud_of_paths,
)
from stochdyn.vectorfields.regression import path_observations, quadratic_variation
from tests.vectorfields.shapes import as_far_as_draws, fibonacci_sphere, torus


def torus_field(points: torch.Tensor) -> torch.Tensor:
    """A flow around both circles of the torus of radii 2 and 0.7."""
    x, y, z = points.unbind(-1)
    rho = (x**2 + y**2).sqrt()
    around = torch.stack([-y / rho, x / rho, torch.zeros_like(x)], -1)
    through = torch.stack([-z * x / rho, -z * y / rho, rho - 2], -1) / 0.7
    return around * (1 + z[..., None]) + 0.7 * through


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    return PointCloud(torus(2000), 12, dim=2)


@pytest.fixture(scope="module")
def paths(cloud: PointCloud) -> sd.PathSample:
    step = 0.02
    sde = sd.SDE(TangentDrift(cloud, torus_field(cloud.points), step), TangentDiffusion(cloud, 0.4))
    ts = torch.arange(0, 3.001, step).double()
    return sd.DiffusionMeasure(cloud.points[:50], sde).sample(ts, generator=torch.Generator().manual_seed(0))


def test_likelihood_is_girsanov_s() -> None:
    """log N(y; b, s²/dt) - log N(y; 0, s²/dt) summed over steps is log dP_b/dP_0 of the same Euler paths, in the plane."""
    rng = np.random.default_rng(0)
    plane = PointCloud(rng.normal(size=(200, 2)), 10, dim=2, frames=np.tile(np.eye(2), (200, 1, 1)))
    sigma = 0.7
    drift = lambda t, x: torch.sin(x) - 0.3 * x  # noqa: E731
    free = sd.DiffusionMeasure(torch.zeros(2).double(), sd.SDE(lambda t, x: 0 * x, sigma))
    ts = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.6]).double()
    path = free.sample(ts, (5,), generator=torch.Generator().manual_seed(0))
    girsanov = free.controlled(lambda t, x: drift(t, x) / sigma).log_rn(path, free)
    seen = path_observations(plane, path)
    y = plane.sites(seen.sites).to_ambient(seen.components)[0].reshape(5, 4, 2)
    b = drift(0.0, path.x[:, :-1])
    scale = sigma * seen.relative.reshape(5, 4, 1).sqrt()
    ratio = torch.distributions.Normal(b, scale).log_prob(y) - torch.distributions.Normal(
        0.0, scale
    ).log_prob(y)
    torch.testing.assert_close(ratio.sum((1, 2)), girsanov)


def test_field_and_diffusion_come_back(cloud: PointCloud, paths: sd.PathSample) -> None:
    gp = RVGP(cloud).fit_paths(paths)
    truth = torus_field(cloud.points)
    # the field is nearer than the posterior says, but not by much: 0.22 of its size, where draws lie at 0.26
    assert abs(as_far_as_draws(gp, truth)) < 4.5
    assert (gp.predict_mean(slice(None)) - truth).norm() < 0.3 * truth.norm()
    rough, error = quadratic_variation(path_observations(cloud, paths))
    assert error == pytest.approx(rough / math.sqrt(2 * 2 * 7500))
    assert abs(gp.diffusion - 0.4) < 4.5 * error
    assert rough > gp.diffusion  # the drift inflates squared increments
    mean, cov = gp.predict(slice(None))
    band = 1.96 * cov.diagonal(dim1=1, dim2=2).sqrt()
    drawn = gp.sample(100, generator=torch.Generator().manual_seed(1))
    nodes = cloud.sites(slice(None))
    share = (nodes.to_tangent(drawn - mean).abs() < band).double().mean((1, 2))
    inside = (nodes.to_tangent(truth - mean).abs() < band).double().mean()
    assert abs(inside - 0.95) < 4.5 * share.std()
    assert gp.log_marginal_likelihood().isfinite()


def test_given_diffusion_and_stride(cloud: PointCloud, paths: sd.PathSample) -> None:
    whole = RVGP(cloud, num_eigenpairs=100).fit_paths(paths, diffusion=0.4)
    assert whole.diffusion == pytest.approx(0.4)
    thinned = RVGP(cloud, num_eigenpairs=100).fit_paths((paths.ts, paths.x), diffusion=0.4, stride=3)
    assert thinned.engine.data.rows < whole.engine.data.rows / 2.9
    for gp in (whole, thinned):
        assert abs(as_far_as_draws(gp, torus_field(cloud.points))) < 4.5


def test_posterior_is_the_dense_one(cloud: PointCloud, paths: sd.PathSample) -> None:
    kernel = ConnectionMatern(cloud, num_eigenpairs=40)
    short = (paths.ts[:11], paths.x[:6, :11])
    gp = RVGP(cloud, kernel).fit_paths(short, diffusion=0.4, optimize=False)
    seen = path_observations(cloud, short)
    with torch.no_grad():
        phi = (kernel.features(seen.sites) * kernel.spectral_weights().sqrt()).flatten(
            0, 1
        ) * gp.amplitude**0.5
        new = (kernel.features(cloud.sites(range(20))) * kernel.spectral_weights().sqrt()).flatten(
            0, 1
        ) * gp.amplitude**0.5
    noise = 0.16 * seen.relative.repeat_interleave(2)
    y = seen.components[0].flatten()
    solved = torch.linalg.solve(phi @ phi.mT + torch.diag(noise), y)
    mean = cloud.sites(range(20)).to_tangent(gp.predict_mean(range(20))).flatten()
    torch.testing.assert_close(mean, new @ phi.mT @ solved, rtol=0, atol=1e-8)


def test_the_posterior_is_a_drift(cloud: PointCloud, paths: sd.PathSample) -> None:
    gp = RVGP(cloud, num_eigenpairs=60).fit_paths(paths)
    sde = gp.as_sde(dt=0.02)
    path = sd.DiffusionMeasure(cloud.points[:20], sde).sample(
        paths.ts[:50], generator=torch.Generator().manual_seed(0)
    )
    ring = (path.x[..., :2].norm(dim=-1) - 2).square() + path.x[..., 2].square()
    assert (ring.sqrt() - 0.7).abs().mean() < 0.02
    draw = gp.as_drift(draw=True, generator=torch.Generator().manual_seed(1))
    mean = gp.as_drift()
    x = cloud.points[:100]
    gap = (draw(0.0, x) - mean(0.0, x)).square().sum(-1).mean()
    trace = gp.predict(range(100))[1].diagonal(dim1=1, dim2=2).sum(-1).mean()
    assert 0.3 < gap / trace < 3


def test_a_cloud_out_of_the_paths(paths: sd.PathSample) -> None:
    cloud = cloud_of_paths(paths, 0.04, dim=2)
    assert 200 < len(cloud) < 600
    gp = RVGP(cloud).fit_paths(paths)
    assert abs(as_far_as_draws(gp, torus_field(cloud.points))) < 4.5


def test_bad_input() -> None:
    cloud = PointCloud(fibonacci_sphere(100), 8, dim=2)
    gp = RVGP(cloud, num_eigenpairs=20)
    ts, x = torch.linspace(0, 1, 5), torch.zeros(2, 5, 3)
    x[..., 2] = 1.0
    with pytest.raises(InvalidInputError, match="a pair of times and states"):
        gp.fit_paths(x)
    with pytest.raises(ShapeError, match="wrong size along axis -2"):
        gp.fit_paths((ts[:4], x))
    with pytest.raises(ShapeError, match="wrong size along axis -1"):
        gp.fit_paths((ts, x[..., :2]))
    with pytest.raises(sd.errors.TimeGridError):
        gp.fit_paths((ts.flip(0), x))
    with pytest.raises(InvalidInputError, match="stride leaves no step"):
        gp.fit_paths((ts, x), stride=9)
    with pytest.raises(InvalidInputError, match="diffusion must be positive"):
        gp.fit_paths((ts, x), diffusion=0.0)
    with pytest.raises(InvalidInputError, match="must be given"):
        gp.fit_paths((ts, x), optimize=False)
    bad = x.clone()
    bad[1, 2, 0] = math.inf
    with pytest.raises(NonFiniteError, match="x"):
        gp.fit_paths((ts, bad))
    gp.fit(range(10), torch.zeros(2, 10, 3), optimize=False)
    with pytest.raises(InvalidInputError, match="many fields"):
        gp.as_drift()


def test_trials_of_unequal_length_and_missing_states() -> None:
    cloud = PointCloud(fibonacci_sphere(200), dim=2)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, 3, generator=g).double().cumsum(0), dim=-1)
    ts = torch.linspace(0, 2, 40).double()
    whole = path_observations(cloud, (ts, x))
    parts = path_observations(cloud, [(ts[:15], x[:15]), (ts[14:], x[14:])])
    assert torch.equal(whole.components, parts.components)
    gap = x.clone()
    gap[20] = math.nan
    assert path_observations(cloud, (ts, gap)).rows == whole.rows - 4
    assert len(cloud_of_paths([(ts[:15], x[:15]), (ts[14:], x[14:])], num_neighbors=5, dim=2)) > 10
