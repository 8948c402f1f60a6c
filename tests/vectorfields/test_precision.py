"""The sparse engine against dense inverses, the spectral kernel with all modes, and its own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import RVGP, AmbientKernel, ConnectionMatern, PointCloud
from stochdyn.vectorfields.regression import MeanVariance, Normals, root_sample
from stochdyn.vectorfields.regression.markov_field import _LOW, _PROBES
from tests.vectorfields.shapes import klein_bottle, random_sphere, sphere_frames


@pytest.fixture(scope="module", params=["complex", "real"])
def cloud(request: pytest.FixtureRequest) -> PointCloud:
    if request.param == "real":
        return PointCloud(klein_bottle(12), 8, dim=2)
    return PointCloud(random_sphere(150), 12, dim=2, normalization="none")


def data(cloud: PointCloud) -> torch.Tensor:
    sites = cloud.sites(slice(None))
    x = cloud.points
    ambient = torch.stack([torch.sin(x[:, 1] + i) + x[:, i] for i in range(x.shape[1])], -1)
    generator = torch.Generator().manual_seed(0)
    return sites.to_ambient(
        sites.to_tangent(ambient + 0.1 * torch.randn(ambient.shape, generator=generator).double())
    )


def dense_kernel(cloud: PointCloud, kappa: float, nu: int) -> torch.Tensor:
    pencil = cloud.pencil(real=True)
    mass = np.repeat(pencil.mass, 2)
    inner = np.linalg.inv(pencil.symmetric().toarray() + 2 * nu / kappa**2 * np.eye(len(mass)))
    k = np.linalg.matrix_power(inner, nu) / np.sqrt(mass[:, None] * mass)
    return torch.as_tensor(k / (k.diagonal() * mass).sum() * mass.sum())


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_evidence_and_posterior_equal_the_dense_inverse(cloud: PointCloud, nu: int) -> None:
    n = len(cloud)
    train, test = np.arange(0, n, 2), np.arange(1, n, 2)
    relative = torch.linspace(0.5, 2, len(train)).double()
    y = data(cloud)[train]
    gp = RVGP(cloud, backend="precision", nu=nu).fit(train, y, relative, optimize=False, noise_variance=0.03)
    k = gp.amplitude * dense_kernel(cloud, gp.engine.lengthscale, nu)
    rows = (2 * train[:, None] + np.arange(2)).ravel()
    others = (2 * test[:, None] + np.arange(2)).ravel()
    covariance = k[rows][:, rows] + torch.diag(0.03 * relative.repeat_interleave(2))
    values = cloud.sites(train).to_tangent(y).flatten()
    law = torch.distributions.MultivariateNormal(torch.zeros(len(rows)).double(), covariance)
    torch.testing.assert_close(gp.log_marginal_likelihood(), law.log_prob(values), rtol=1e-9, atol=1e-7)
    mean, cov = gp.predict(test)
    cross = k[others][:, rows]
    torch.testing.assert_close(
        cloud.sites(test).to_tangent(mean).flatten(),
        cross @ torch.linalg.solve(covariance, values),
        rtol=0,
        atol=1e-8,
    )
    joint = k[others][:, others] - cross @ torch.linalg.solve(covariance, cross.T)
    blocks = torch.stack([joint[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] for i in range(len(test))])
    torch.testing.assert_close(cov, blocks, rtol=0, atol=1e-8)


def test_all_modes_of_the_spectral_kernel_give_the_same(cloud: PointCloud) -> None:
    n = len(cloud)
    kernel = ConnectionMatern(cloud, 2.0, num_eigenpairs=2 * n)
    y, train = data(cloud), range(0, n, 3)
    spectral = RVGP(cloud, kernel).fit(train, y[::3], optimize=False, noise_variance=0.05)
    sparse = RVGP(cloud, kernel, backend="precision").fit(train, y[::3], optimize=False, noise_variance=0.05)
    # the two average their prior variances differently: over nodes, and over area
    mass = torch.as_tensor(cloud.mass)
    x = cloud.rows(range(n))
    weighted = float((kernel(x, x, diag=True).detach().reshape(n, 2).mean(1) * mass).sum() / mass.sum())
    sparse.engine.log_amplitude.data.add_(math.log(weighted))
    sparse.engine.condition()
    torch.testing.assert_close(spectral.log_marginal_likelihood(), sparse.log_marginal_likelihood())
    for a, b in zip(spectral.predict(range(n)), sparse.predict(range(n)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_samples_have_the_posterior_moments(cloud: PointCloud, nu: int) -> None:
    gp = RVGP(cloud, backend="precision", nu=nu).fit(range(0, len(cloud), 5), data(cloud)[::5])
    n, where = 3000, [1, 2, 77]
    drawn = cloud.sites(where).to_tangent(gp.sample(n, where, torch.Generator().manual_seed(0)))
    mean, cov = gp.predict(where)
    spread = cov.diagonal(dim1=1, dim2=2).sqrt()
    assert ((drawn.mean(0) - cloud.sites(where).to_tangent(mean)) / spread).abs().max() < 4.5 / math.sqrt(n)
    assert (drawn.var(0) / spread**2 - 1).abs().max() < 4.5 * math.sqrt(2 / n)


def test_root_of_the_precision(cloud: PointCloud) -> None:
    pencil = cloud.pencil()
    draw = Normals(torch.Generator().manual_seed(0), pencil.paired)
    count = 4000
    kicks = root_sample(cloud, pencil, 0.3, count, draw)
    scale = 2.0 if pencil.paired else 1.0
    got = (kicks @ kicks.conj().T) / (count * scale)
    expected = pencil.symmetric().toarray() + 0.3 * np.eye(len(got))
    diagonal = expected.diagonal().real
    error = np.abs(got - expected) / np.sqrt(diagonal[:, None] * diagonal)
    assert error.max() < 5.5 / math.sqrt(count)


def test_learnt_parameters_are_those_that_made_the_data() -> None:
    points = random_sphere(400)
    cloud = PointCloud(points, 12, frames=sphere_frames(points))
    maker = RVGP(cloud, backend="precision", nu=2).fit(
        [0], torch.zeros(1, 3).double(), optimize=False, noise_variance=1e6
    )
    maker.engine.log_amplitude.data.fill_(0.0)
    maker.engine.log_lengthscale.data.fill_(math.log(0.6))
    maker.engine.condition()
    generator = torch.Generator().manual_seed(0)
    fields = maker.sample(30, generator=generator)
    noisy = fields + 0.3 * torch.randn(fields.shape, generator=generator, dtype=torch.float64)
    sites = cloud.sites(slice(None))
    noisy = sites.to_ambient(sites.to_tangent(noisy))
    gp = RVGP(cloud, backend="precision", nu=2).fit(range(200), noisy[:, :200])
    mean, cov = gp.predict(range(200, 400))
    reached, learnt = float(gp.log_marginal_likelihood()), gp.noise_variance
    engine = gp.engine
    for parameter, value in (
        (engine.log_noise, 0.09),
        (engine.log_lengthscale, 0.6),
        (engine.log_amplitude, 1.0),
    ):
        parameter.data.fill_(math.log(value))
    # twice the gain over the truth is chi-square with three degrees of freedom: above 16.3 in one case of a thousand
    assert 0.0 < 2 * (reached - float(gp.log_marginal_likelihood())) < 16.3
    assert learnt == pytest.approx(0.09, rel=0.2)
    gap = cloud.sites(range(200, 400)).to_tangent(mean - fields[:, 200:])
    inside = (gap.abs() < 1.96 * cov.diagonal(dim1=1, dim2=2).sqrt()).double().mean()
    assert abs(inside - 0.95) < 0.015


def test_mean_variance_by_quadrature() -> None:
    """Within 4.5 standard errors of the quadrature's random probes, which follow from the exact eigenvalues.

    v*f(A)v of a uniform complex unit vector of dimension N has the variance var f / (N + 1).
    """
    cloud = PointCloud(random_sphere(1700), 12, dim=2)
    pencil = cloud.pencil()
    assert pencil.symmetric().shape[0] > 1500
    values = np.linalg.eigvalsh(pencil.symmetric().toarray())
    quick = MeanVariance(cloud, pencil)
    for shift in (0.01, 1.0, 100.0):
        for nu in (1, 2, 3):
            powers = (shift + values) ** (-float(nu))
            rest = powers[_LOW // 2 :]  # the others are computed
            error = len(rest) * rest.std() / math.sqrt((len(rest) + 1) * _PROBES) / powers.sum()
            assert error < 0.01
            exact = 2 * powers.sum() / quick.total
            assert abs(quick(shift, nu) / exact - 1) < 4.5 * error


def test_fit_at_new_points() -> None:
    points = random_sphere(800)
    cloud = PointCloud(points, 16, dim=2)
    new = random_sphere(200, seed=4)
    spin = torch.as_tensor(np.cross([0.1, 0.2, 1.0], new))
    gp = RVGP(cloud, backend="precision").fit(new, spin)
    truth = torch.as_tensor(np.cross([0.1, 0.2, 1.0], points))
    mean, cov = gp.predict(range(800))
    assert (mean - truth).norm() < 0.1 * truth.norm()
    assert (torch.linalg.eigvalsh(cov) > 0).all()
    assert gp.predict(new[:5])[0].shape == (5, 3)


def test_bad_requests(cloud: PointCloud) -> None:
    with pytest.raises(InvalidInputError, match="whole nu"):
        RVGP(cloud, backend="precision", nu=1.5).fit([0], data(cloud)[:1])
    for kernel in ("ambient", AmbientKernel(cloud)):
        with pytest.raises(InvalidInputError, match="knows the connection Matérn kernel"):
            RVGP(cloud, kernel, backend="precision")
