"""Functions by the machine of vector fields: exactness, the identity with components of flat fields, calibration, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    UnavailableError,
)
from stochdyn.testing import (
    check_company,
    check_forms,
    check_order,
    check_precision,
    check_repetition,
    check_units,
)
from stochdyn.vectorfields import (
    RVGP,
    ConnectionMatern,
    HodgeMatern,
    PointCloud,
    ScalarGP,
    track_singularities,
)
from tests.vectorfields.shapes import fibonacci_sphere, icosphere, random_sphere


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    return PointCloud(fibonacci_sphere(300), 12, dim=2)


def height(points: torch.Tensor) -> torch.Tensor:
    return points[..., 0] * points[..., 2] + 0.5 * points[..., 1]


def test_the_laplacian_is_that_of_functions(cloud: PointCloud) -> None:
    bundle = cloud.functions()
    assert repr(bundle) == "functions on 300 points in 3 dimensions"
    assert bundle.value_dim == bundle.dim == 1
    torch.testing.assert_close(bundle.spectrum(20)[0], cloud.spectrum(20, "scalar")[0])
    # spherical harmonics of degree l: l (l + 1), 2 l + 1 times
    exact = torch.tensor([0.0] + [2.0] * 3 + [6.0] * 5).double()
    torch.testing.assert_close(bundle.spectrum(9)[0], exact, rtol=0.06, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{"num_eigenpairs": 80}, {"backend": "precision", "nu": 2}, {"kernel": "ambient"}]
)
def test_posterior_equals_dense_algebra(cloud: PointCloud, options: dict) -> None:
    train, test = np.arange(0, 300, 3), np.arange(1, 300, 3)
    y = (
        height(cloud.points)[train]
        + 0.1 * torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    )
    gp = ScalarGP(cloud, **options).fit(train, y, optimize=False, noise_variance=0.02)
    bundle = cloud.functions()
    kernel = gp.kernel
    if "backend" in options:  # all modes of the spectral kernel, normalised by masses
        lengthscale = float(kernel.lengthscale.detach())
        kernel = ConnectionMatern(bundle, 2.0, 300)
        kernel.lengthscale = lengthscale
        weighted = (
            kernel.spectral_weights()
            * torch.as_tensor(bundle.mass)[:, None]
            * bundle.modes(300)[1][:, 0] ** 2
        ).sum() / bundle.mass.sum()
        gp.engine.log_amplitude.data.add_(math.log(float(weighted.detach())))
        gp.engine.condition()
    with torch.no_grad():
        amplitude = gp.engine.amplitude
        if "backend" in options:
            amplitude = amplitude / weighted
        x, x_new = bundle.rows(train), bundle.rows(test)
        k, cross = (amplitude * kernel(a, x).to_dense() for a in (x, x_new))
        prior = amplitude * kernel(x_new, diag=True)
        noisy = k + 0.02 * torch.eye(100)
        solved = torch.linalg.solve(noisy, torch.cat([y[:, None], cross.mT], 1))
    mean, variance = gp.predict(test)
    torch.testing.assert_close(mean, cross @ solved[:, 0], rtol=0, atol=1e-8)
    torch.testing.assert_close(variance, prior - (cross * solved[:, 1:].mT).sum(-1), rtol=0, atol=1e-8)
    law = torch.distributions.MultivariateNormal(torch.zeros(100).double(), noisy)
    assert float(gp.log_marginal_likelihood()) == pytest.approx(float(law.log_prob(y)), abs=1e-6)


def test_a_component_of_a_flat_field_is_a_function() -> None:
    """In the plane transport changes nothing, so that each component of a vector field is a scalar field."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1, (150, 2))
    cloud = PointCloud(xy, 10, frames=np.tile(np.eye(2), (150, 1, 1)))
    field = torch.as_tensor(
        np.stack([np.sin(4 * xy[:, 0]), np.cos(3 * xy[:, 1])], 1) + 0.1 * rng.normal(size=(150, 2))
    )
    new = rng.uniform(0.1, 0.9, (20, 2))
    whole = RVGP(cloud, num_eigenpairs=300).fit(range(100), field[:100])
    with torch.no_grad():
        lengthscale = float(whole.kernel.lengthscale.detach())
    for i in range(2):
        gp = ScalarGP(cloud, num_eigenpairs=150)
        gp.kernel.lengthscale = lengthscale
        gp.fit(range(100), field[:100, i], optimize=False, noise_variance=whole.noise_variance)
        gp.engine.log_amplitude.data.copy_(whole.engine.log_amplitude.data)
        gp.engine.condition()
        for where in (range(100, 150), new):
            mean, cov = whole.predict(where, covariance="ambient")
            m, v = gp.predict(where)
            torch.testing.assert_close(m, mean[:, i], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(v, cov[:, i, i], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("options", [{}, {"backend": "precision"}, {"kernel": "ambient"}])
def test_bands_hold_at_new_points(options: dict, mesh: bool) -> None:
    cloud = PointCloud.from_mesh(*icosphere(3)) if mesh else PointCloud(fibonacci_sphere(600), 12, dim=2)
    generator = torch.Generator().manual_seed(0)

    def truth(points: torch.Tensor) -> torch.Tensor:
        return (4 * points[:, 1]).sin() + (3 * points[:, 0]).cos() * points[:, 2]

    seen = torch.randperm(len(cloud), generator=generator)[:300]
    y = truth(cloud.points[seen]) + 0.1 * torch.randn(300, generator=generator, dtype=torch.float64)
    gp = ScalarGP(cloud, **options).fit(seen, y)
    new = torch.as_tensor(random_sphere(1000, seed=3))
    mean, variance = gp.predict(new)
    z = (mean - truth(new)) / variance.sqrt()
    assert 0.9 < float((z.abs() < 1.96).double().mean()) <= 1.0
    assert float((mean - truth(new)).square().mean().sqrt()) < 0.1


def test_invariances(cloud: PointCloud) -> None:
    y = (
        height(cloud.points)[::2]
        + 0.1 * torch.randn(150, generator=torch.Generator().manual_seed(0)).double()
    )

    def answer(values: object) -> torch.Tensor:
        return torch.stack(
            ScalarGP(cloud, num_eigenpairs=60).fit(range(0, 300, 2), values).predict([1, 3, 5])
        )

    check_forms(answer, y)
    check_repetition(lambda: answer(y))
    check_precision(lambda dtype: answer(y.to(dtype)))

    def in_units(factor: float) -> torch.Tensor:
        scaled = PointCloud(cloud.points * factor, 12, dim=2)
        gp = ScalarGP(scaled, num_eigenpairs=60).fit(range(0, 300, 2), y * factor)
        mean, variance = gp.predict([1, 3, 5])
        return torch.stack([mean / factor, variance / factor**2])

    check_units(in_units, rtol=1e-4)
    many = torch.stack([y, 2 * y.flip(0), y.roll(7)])

    def means(values: torch.Tensor) -> torch.Tensor:
        gp = ScalarGP(cloud, num_eigenpairs=60).fit(
            range(0, 300, 2), values, optimize=False, noise_variance=0.01
        )
        gp.engine.log_amplitude.data.fill_(0.0)
        gp.engine.condition()
        return gp.predict_mean([1, 3, 5])

    check_order(means, many, equivariant=True)
    check_company(means, many)


def test_auto_and_bad_input(cloud: PointCloud) -> None:
    y = height(cloud.points)
    gp = ScalarGP(cloud, "auto").fit(range(0, 300, 4), y[::4], progress=False)
    assert gp.chosen.startswith("ambient")  # a polynomial of the coordinates
    assert not any("projected" in c.name or "free" in c.name for c in gp.candidates)
    other = ScalarGP(cloud, "auto")
    other.load_state_dict(gp.state_dict())
    assert torch.equal(other.predict([1])[1], gp.predict([1])[1])
    with pytest.raises(InvalidInputError, match="kernel is unknown"):
        ScalarGP(cloud, "connection")
    with pytest.raises(InvalidInputError, match="functions are no vector fields"):
        RVGP(cloud.functions())
    with pytest.raises(InvalidInputError, match="of functions"):
        HodgeMatern(cloud.functions())
    with pytest.raises(InvalidInputError, match="orientable surfaces"):
        track_singularities(cloud.functions(), torch.zeros(3, 300, 1))
    one = ScalarGP(cloud, num_eigenpairs=20)
    with pytest.raises(UnavailableError, match="no posterior"):
        one.predict([0])
    with pytest.raises(ShapeError, match="values has the wrong size"):
        one.fit(range(10), y[:9])
    with pytest.raises(NonFiniteError, match="values must be finite"):
        one.fit(range(2), [1.0, math.inf])
    with pytest.raises(InvalidInputError, match="one value per row"):
        one.fit(range(2), [[1.0, 2.0]], labels=["a", "b"])
    assert one.fit([0, 1], [1.0, math.nan]).engine.num_sites == 1


def test_a_level_far_from_zero_is_said(cloud: PointCloud) -> None:
    index, wave = torch.arange(len(cloud)), cloud.points[:, 0]
    with pytest.warns(ApproximationWarning, match="Subtract the level first"):
        ScalarGP(cloud).fit(index, 100.0 + wave, optimize=False)
