"""Regression: exactness against dense algebra, calibration, batches, new points, noise, what it refuses."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from gpytorch.kernels import ScaleKernel

import stochdyn as sd
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    UnavailableError,
)
from stochdyn.vectorfields import (
    RVGP,
    AmbientKernel,
    ConnectionMatern,
    PointCloud,
    ProjectedMatern,
    ScalarFactor,
)
from tests.vectorfields.shapes import as_far_as_draws, icosphere, random_sphere, sphere_frames


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    points = random_sphere(300)
    return PointCloud(points, 12, frames=sphere_frames(points))


@pytest.fixture(scope="module")
def field(cloud: PointCloud) -> torch.Tensor:
    x, y, z = cloud.points.T
    ambient = torch.stack([torch.sin(2 * y) + 0.5 * z, torch.cos(2 * z) - x, torch.sin(2 * x + y)], -1)
    sites = cloud.sites(slice(None))
    return sites.to_ambient(sites.to_tangent(ambient))


def noisy(field: torch.Tensor, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return field + scale * torch.randn(field.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: ConnectionMatern(c, num_eigenpairs=80),
        lambda c: ConnectionMatern(c, num_eigenpairs=400),
        lambda c: ProjectedMatern(c, num_eigenpairs=30),
        AmbientKernel,
        lambda c: ScaleKernel(ConnectionMatern(c, num_eigenpairs=40)) + ProjectedMatern(c, num_eigenpairs=20),
        lambda c: ConnectionMatern(c, num_eigenpairs=40) + AmbientKernel(c),
        lambda c: ConnectionMatern(c, num_eigenpairs=40) * ScalarFactor(c, 2.5),
    ],
)
def test_posterior_and_evidence_equal_dense_algebra(
    cloud: PointCloud, field: torch.Tensor, make: object
) -> None:
    kernel = make(cloud)
    train, test = np.arange(0, 300, 3), np.arange(1, 300, 3)
    relative = torch.linspace(0.5, 2, 100).double()
    y = noisy(field, 0.1)[train]
    gp = RVGP(cloud, kernel).fit(train, y, relative, optimize=False, noise_variance=0.02)
    with torch.no_grad():
        x, x_new = cloud.rows(train), cloud.rows(test)
        k, cross, prior = (
            kernel(a, b).to_dense() * gp.engine.amplitude for a, b in ((x, x), (x_new, x), (x_new, x_new))
        )
        noise = 0.02 * relative.repeat_interleave(2)
        values = cloud.sites(train).to_tangent(y).flatten()
        law = torch.distributions.MultivariateNormal(torch.zeros(200).double(), k + torch.diag(noise))
        torch.testing.assert_close(gp.log_marginal_likelihood(), law.log_prob(values), rtol=1e-10, atol=1e-8)
        solved = torch.linalg.solve(k + torch.diag(noise), torch.cat([values[:, None], cross.mT], 1))
    mean, cov = gp.predict(test)
    torch.testing.assert_close(
        cloud.sites(test).to_tangent(mean).flatten(), cross @ solved[:, 0], rtol=0, atol=1e-8
    )
    joint = (prior - cross @ solved[:, 1:]).reshape(100, 2, 100, 2)
    torch.testing.assert_close(cov, torch.stack([joint[i, :, i] for i in range(100)]), rtol=0, atol=1e-8)
    assert (
        torch.linalg.eigvalsh(torch.stack([prior.reshape(100, 2, 100, 2)[i, :, i] for i in range(100)]) - cov)
        > -1e-9
    ).all()
    ambient = gp.predict(test, covariance="ambient")[1]
    torch.testing.assert_close(gp.frames(test).mT @ ambient @ gp.frames(test), cov)


def test_joint_samples_have_the_posterior_moments(cloud: PointCloud, field: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=60).fit(range(0, 300, 5), noisy(field, 0.2)[::5])
    n, where = 4000, [1, 2, 77]
    drawn = cloud.sites(where).to_tangent(gp.sample(n, where, torch.Generator().manual_seed(0)))
    mean, cov = gp.predict(where)
    gap = (drawn.mean(0) - cloud.sites(where).to_tangent(mean)) / cov.diagonal(dim1=1, dim2=2).sqrt()
    assert gap.abs().max() < 4.5 / math.sqrt(n)
    variance = drawn.var(0) / cov.diagonal(dim1=1, dim2=2)
    assert (variance - 1).abs().max() < 4.5 * math.sqrt(2 / n)
    again = gp.sample(2, where, torch.Generator().manual_seed(0))
    assert torch.equal(again, gp.sample(2, where, torch.Generator().manual_seed(0)))
    assert gp.sample(2).shape == (2, 300, 3)


def test_intervals_cover_fields_of_the_prior(cloud: PointCloud) -> None:
    """95 % bands of 40 fields drawn from the prior hold 95 % of held-out components, hyper-parameters learnt."""
    kernel = ConnectionMatern(cloud, 1.5, num_eigenpairs=200)
    kernel.lengthscale = 0.5
    sites = cloud.sites(slice(None))
    with torch.no_grad():
        root = kernel.spectral_weights().sqrt() * kernel.features(sites)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.einsum("qak,kb->bqa", root, torch.randn(200, 40, generator=generator, dtype=torch.float64))
    noise = 0.2 * torch.randn(drawn.shape, generator=generator, dtype=torch.float64)
    data = sites.to_ambient(drawn + noise)
    gp = RVGP(cloud, ConnectionMatern(cloud, 1.5, num_eigenpairs=200)).fit(range(150), data[:, :150])
    assert gp.noise_variance == pytest.approx(0.04, rel=0.1)
    assert gp.amplitude == pytest.approx(1.0, rel=0.2)
    assert gp.kernel.lengthscale.item() == pytest.approx(0.5, rel=0.2)
    mean, cov = gp.predict(range(150, 300))
    gap = cloud.sites(range(150, 300)).to_tangent(mean) - drawn[:, 150:]
    inside = (gap.abs() < 1.96 * cov.diagonal(dim1=1, dim2=2).sqrt()).double().mean()
    assert abs(inside - 0.95) < 0.015


def test_many_fields_share_one_factorisation(cloud: PointCloud, field: torch.Tensor) -> None:
    fields = torch.stack([noisy(field, 0.1, seed) for seed in range(6)]).reshape(2, 3, 300, 3)
    gp = RVGP(cloud, num_eigenpairs=60).fit(range(100), fields[..., :100, :])
    mean, cov = gp.predict(range(100, 300))
    assert mean.shape == (2, 3, 200, 3)
    assert cov.shape == (200, 2, 2)
    assert gp.sample(4, [5, 6]).shape == (4, 2, 3, 2, 3)
    one = RVGP(cloud, gp.kernel).fit(
        range(100), fields[1, 2, :100], optimize=False, noise_variance=gp.noise_variance
    )
    one.engine.log_amplitude.data.fill_(math.log(gp.amplitude))
    one.engine.condition()
    torch.testing.assert_close(one.predict(range(100, 300))[0], mean[1, 2])


def test_noise_falls_to_interpolation(cloud: PointCloud, field: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=600).fit(
        range(50), field[:50], optimize=False, learn_noise=False, noise_variance=1e-10
    )
    torch.testing.assert_close(gp.predict(range(50))[0], field[:50], rtol=0, atol=1e-5)


def test_known_variances_weigh_the_data(cloud: PointCloud, field: torch.Tensor) -> None:
    """A third of the data is spoilt; told so, the fit is nearly as good as without it."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.where(torch.arange(200) % 3 == 0, 2.0, 0.05).double()
    data = field[:200] + scale[:, None] * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    data = cloud.sites(range(200)).to_ambient(cloud.sites(range(200)).to_tangent(data))
    told = RVGP(cloud).fit(range(200), data, scale**2, learn_noise=False)
    assert told.noise_variance == 1.0
    untold = RVGP(cloud).fit(range(200), data)
    error = [
        float((g.predict(range(200, 300))[0] - field[200:]).norm() / field[200:].norm())
        for g in (told, untold)
    ]
    assert error[0] < 0.5 * error[1]
    learnt = RVGP(cloud).fit(range(200), data, 7.0 * scale**2)
    assert learnt.noise_variance == pytest.approx(1 / 7, rel=0.25)


def test_new_points_are_predicted_as_well_as_nodes() -> None:
    points = random_sphere(1500)
    cloud = PointCloud(points, 20, dim=2)
    spin = torch.as_tensor(np.cross([0.3, -0.5, 1.0], points))
    gp = RVGP(cloud).fit(range(500), noisy(spin, 0.1)[:500])
    assert as_far_as_draws(gp, spin[500:], range(500, 1500)) < 4.5
    new = random_sphere(500, seed=3)
    truth = torch.as_tensor(np.cross([0.3, -0.5, 1.0], new))
    assert gp.predict(new)[1].shape == (500, 2, 2)
    assert as_far_as_draws(gp, truth, new) < 4.5
    at_nodes, at_points = (
        ((gp.predict_mean(where) - field).norm() / field.norm())
        for where, field in ((range(500, 1500), spin[500:]), (new, truth))
    )
    assert at_points < 1.1 * at_nodes
    # and sites of observations may be new points too
    other = RVGP(cloud).fit(new, truth)
    assert (other.predict(range(1500))[0] - spin).norm() < 0.06 * spin.norm()


def test_precision_follows_the_data_and_the_result_is_pure(cloud: PointCloud, field: torch.Tensor) -> None:
    mean, cov = RVGP(cloud, num_eigenpairs=40).fit(range(50), field[:50].float()).predict([60])
    assert mean.dtype == cov.dtype == torch.float32
    assert not mean.requires_grad
    assert not cov.requires_grad


def test_normal_parts_are_reported(cloud: PointCloud, field: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=40)
    assert gp.fit(range(100), field[:100]).lost_share < 1e-12
    tilted = field + 0.5 * cloud.points
    share = 0.25 * 100 / float((tilted[:100] ** 2).sum())
    with pytest.warns(ApproximationWarning, match="normal to the tangent spaces"):
        gp.fit(range(100), tilted[:100])
    assert gp.lost_share == pytest.approx(share)


def test_bad_input(cloud: PointCloud, field: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match="kernel is unknown"):
        RVGP(cloud, "banana")
    with pytest.raises(InvalidInputError, match="backend is unknown"):
        RVGP(cloud, backend="banana")
    with pytest.raises(InvalidInputError, match="must be a PointCloud"):
        RVGP(cloud.points)
    with pytest.raises(InvalidInputError, match="name or a gpytorch kernel"):
        RVGP(cloud, 3)
    for options in ({"nu": 2.5}, {"num_eigenpairs": 40}, {"backend": "precision"}):
        with pytest.raises(InvalidInputError, match="chooses backend, num_eigenpairs and nu itself"):
            RVGP(cloud, "auto", **options)
    with pytest.raises(InvalidInputError, match="kernel=ambient"):
        RVGP(cloud, "ambient", num_eigenpairs=40)
    with pytest.raises(InvalidInputError, match="backend=precision"):
        RVGP(cloud, backend="precision", num_eigenpairs=40)
    with pytest.raises(InvalidInputError, match="nu is for named kernels"):
        RVGP(cloud, AmbientKernel(cloud), nu=2.5)
    gp = sd.vectorfields.RVGP(cloud, num_eigenpairs=20)
    assert "connection on PointCloud(300 points" in repr(gp)
    assert "not fitted" in repr(gp)
    with pytest.raises(UnavailableError, match="Call fit"):
        gp.predict([0])
    with pytest.raises(ShapeError, match=r"expected \(\*batch, 10, 3\)"):
        gp.fit(range(10), field[:9])
    with pytest.raises(InvalidInputError, match="outside the cloud"):
        gp.fit([300], field[:1])
    bad = field[:10].clone()
    bad[3, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"vectors must be finite; got .*=inf"):
        gp.fit(range(10), bad)
    with pytest.raises(ShapeError, match="one number per site"):
        gp.fit(range(10), field[:10], torch.ones(9))
    with pytest.raises(InvalidInputError, match="variances must be positive"):
        gp.fit(range(10), field[:10], torch.zeros(10))
    gp.fit(range(10), field[:10])
    assert "fitted at 10 sites: amplitude" in repr(gp)
    with pytest.raises(InvalidInputError, match="covariance is unknown"):
        gp.predict([0], covariance="banana")


@pytest.mark.parametrize("unit", [1e-12, 6.371e6, 1e12])
@pytest.mark.parametrize(
    "options", [{}, {"kernel": "projected"}, {"kernel": "ambient"}, {"backend": "precision"}]
)
def test_the_answer_is_the_same_in_every_unit_of_length_and_of_the_field(unit: float, options: dict) -> None:
    points = random_sphere(150) * np.array([1.0, 1.1, 1.3])
    field = torch.as_tensor(np.sin(3 * points[:, [1, 2, 0]]))
    seen, new = range(0, 150, 2), range(1, 150, 2)

    def fitted(length: float, strength: float) -> RVGP:
        made = PointCloud(points * length, dim=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a field of the surrounding space has normal parts
            return RVGP(made, **options).fit(seen, strength * field[::2])

    one, other = fitted(1.0, 1.0), fitted(unit, 1.0 / unit)
    mean, cov = one.predict(new)
    again, again_cov = other.predict(new)
    torch.testing.assert_close(again * unit, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again_cov * unit**2, cov, rtol=1e-2, atol=1e-4)
    shift = one.engine.data.rows * math.log(unit)  # the density of the data has their unit
    assert float(other.log_marginal_likelihood()) - shift == pytest.approx(
        float(one.log_marginal_likelihood()), abs=1e-2
    )


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("options", [{}, {"kernel": "projected"}, {"backend": "precision"}])
def test_bands_hold_at_new_points_between_the_nodes(mesh: bool, options: dict) -> None:
    """95 % bands hold 90 to 98 % of a field of one's own prior at places between the nodes."""
    vertices, faces = icosphere(3)
    made = PointCloud.from_mesh(vertices, faces) if mesh else PointCloud(vertices, dim=2)
    new = torch.nn.functional.normalize(torch.as_tensor(random_sphere(800, seed=5)), dim=-1)

    def truth(p: torch.Tensor) -> torch.Tensor:
        f = torch.sin(5 * p[:, [1, 2, 0]])
        return f - (f * p).sum(-1, keepdim=True) * p

    at = torch.as_tensor(vertices)
    gp = RVGP(made, **options).fit(range(0, len(at), 2), noisy(truth(at), 0.1)[::2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean, cov = gp.predict(new)
    z = torch.einsum("qdm,qd->qm", gp.frames(new), mean - truth(new)) / cov.diagonal(dim1=1, dim2=2).sqrt()
    assert 0.90 < float((z.abs() < 1.96).double().mean()) <= 1.0
    assert float(z.abs().median()) < 1.0


def test_past_the_border_and_in_holes_the_field_is_its_prior() -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (700, 2))
    points = points[np.hypot(*points.T) > 0.45]
    field = np.stack([np.sin(3 * points[:, 0]), np.cos(3 * points[:, 1])], 1)
    for options in ({}, {"kernel": "projected"}, {"backend": "precision"}):
        gp = RVGP(PointCloud(points, dim=2), **options).fit(range(len(points)), field)
        with pytest.warns(ApproximationWarning, match="falls back to its prior"):
            mean, cov = gp.predict(np.array([[0.0, 0.0], [1.3, 0.0], [30.0, 0.0]]))
        assert mean[2].norm() < 0.02 * gp.amplitude**0.5
        assert cov[2].diagonal().mean() == pytest.approx(gp.amplitude, rel=0.4)
        assert (cov.diagonal(dim1=1, dim2=2).mean(-1) > 0.05 * gp.amplitude).all()


def test_measurement_noise_is_no_diffusion(cloud: PointCloud, field: torch.Tensor) -> None:
    gp = RVGP(cloud, num_eigenpairs=40).fit(range(300), noisy(field, 0.3))
    with pytest.raises(UnavailableError, match="error of measurement"):
        gp.as_sde()
    law = gp.measure(cloud.points[:3], diffusion=0.2, dt=0.01)
    assert law.sample(torch.linspace(0, 0.05, 6).double(), 4).x.shape == (4, 3, 6, 3)


def test_missing_vectors_are_left_out(cloud: PointCloud, field: torch.Tensor) -> None:
    y = noisy(field, 0.1)[:60].clone()
    y[[3, 17]] = math.nan
    kept = [i for i in range(60) if i not in (3, 17)]
    some = RVGP(cloud, num_eigenpairs=40).fit(range(60), y)
    rest = RVGP(cloud, num_eigenpairs=40).fit(kept, y[kept])
    assert torch.equal(some.predict_mean([70]), rest.predict_mean([70]))


def test_the_kernel_and_the_amplitude_say_what_was_fitted(cloud: PointCloud, field: torch.Tensor) -> None:
    sparse = RVGP(cloud, backend="precision").fit(range(300), noisy(field, 0.1))
    assert sparse.kernel.lengthscale.item() == pytest.approx(sparse.engine.lengthscale)
    scaled = RVGP(cloud, ScaleKernel(ConnectionMatern(cloud, num_eigenpairs=60))).fit(
        range(300), noisy(field, 0.1)
    )
    with torch.no_grad():
        prior = scaled.engine.amplitude * scaled.kernel(cloud.rows(slice(None)), diag=True).mean()
    assert scaled.amplitude == pytest.approx(float(prior), rel=1e-6)
    with pytest.raises(UnavailableError, match="no kernel yet"):
        RVGP(cloud, "auto").kernel  # noqa: B018


@pytest.mark.parametrize("options", [{}, {"kernel": "ambient"}, {"backend": "precision"}])
def test_a_field_of_zeros_has_no_amplitude_to_learn(options):
    points = torch.nn.functional.normalize(
        torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    cloud = PointCloud(points.double(), dim=2)
    with pytest.raises(InvalidInputError, match="zero everywhere"):
        RVGP(cloud, **options).fit(range(20), torch.zeros(20, 3).double(), progress=False)
    mean, _ = (
        RVGP(cloud, **options).fit(range(20), torch.zeros(20, 3).double(), optimize=False).predict([0, 30])
    )
    assert mean.abs().max() == 0
