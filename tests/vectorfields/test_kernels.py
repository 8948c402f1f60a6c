"""Kernels: unit mean variance, formulas, gauge, gradients, and gpytorch's own regression on them."""

from __future__ import annotations

import math

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.kernels import ScaleKernel

import stochdyn as sd
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields import (
    RVGP,
    AmbientKernel,
    ConnectionMatern,
    FeatureKernel,
    PointCloud,
    ProjectedMatern,
    ScalarFactor,
)
from tests.vectorfields.shapes import fibonacci_sphere, random_sphere, sphere_frames


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    return PointCloud(random_sphere(200), 12, dim=2)


def dense(kernel: gpytorch.kernels.Kernel, cloud: PointCloud, where: object = slice(None)) -> torch.Tensor:
    x = cloud.rows(where)
    with torch.no_grad():
        return kernel(x, x).to_dense()


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, math.inf])
@pytest.mark.parametrize("kind", [ConnectionMatern, ProjectedMatern, AmbientKernel])
def test_mean_variance_is_one(cloud: PointCloud, kind: type, nu: float) -> None:
    kernel = kind(cloud, nu)
    variance = dense(kernel, cloud).diagonal()
    assert torch.allclose(
        variance.mean(), torch.tensor(1.0).double(), atol=0.02 if kind is ProjectedMatern else 1e-9
    )
    values = torch.linalg.eigvalsh(dense(kernel, cloud))
    assert values.min() > -1e-9
    x = cloud.rows(slice(None))
    torch.testing.assert_close(kernel(x, x, diag=True), variance)


@pytest.mark.parametrize("nu", [1.5, math.inf])
def test_connection_kernel_is_a_function_of_the_laplacian(cloud: PointCloud, nu: float) -> None:
    kernel = ConnectionMatern(cloud, nu, num_eigenpairs=60)
    kernel.lengthscale = 0.7
    values, modes = cloud.modes(60)
    weight = torch.exp(-(0.7**2) * values / 2) if math.isinf(nu) else (2 * nu / 0.7**2 + values) ** (-nu)
    flat = modes.reshape(-1, 60)
    expected = flat @ torch.diag(weight) @ flat.T
    expected /= expected.diagonal().mean()
    torch.testing.assert_close(dense(kernel, cloud), expected)


def test_projected_kernel_formula(cloud: PointCloud) -> None:
    kernel = ProjectedMatern(cloud, 2.5, num_eigenpairs=30)
    values, modes = cloud.modes(30, "scalar")
    waves = modes[:, 0]
    weight = (2 * 2.5 / kernel.lengthscale.detach().squeeze() ** 2 + values) ** (-2.5)
    scalar = waves @ torch.diag(weight) @ waves.T
    scalar /= scalar.diagonal().mean()
    frames = torch.einsum("nda,mdb->namb", cloud.frames, cloud.frames)
    expected = (frames * scalar[:, None, :, None]).reshape(400, 400)
    torch.testing.assert_close(dense(kernel, cloud), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: ConnectionMatern(c, num_eigenpairs=50),
        lambda c: ProjectedMatern(c, num_eigenpairs=20),
        AmbientKernel,
        lambda c: ConnectionMatern(c, num_eigenpairs=50) * ScalarFactor(c),
        lambda c: ScaleKernel(ConnectionMatern(c, num_eigenpairs=50)) + ScaleKernel(AmbientKernel(c)),
    ],
)
def test_lifted_kernels_do_not_depend_on_frames(make: object) -> None:
    points = random_sphere(120)
    turns = np.linalg.qr(np.random.default_rng(0).normal(size=(120, 2, 2)))[0]
    exact = sphere_frames(points)
    lifted = []
    for frames in (exact, exact @ turns):
        cloud = PointCloud(points, 12, frames=frames)
        k = dense(make(cloud), cloud).reshape(120, 2, 120, 2)
        lifted.append(torch.einsum("nda,namb,meb->ndme", cloud.frames, k, cloud.frames))
    torch.testing.assert_close(lifted[0], lifted[1], rtol=0, atol=1e-9)


def test_rows_by_number_and_by_direction_agree(cloud: PointCloud) -> None:
    numbers = torch.tensor([[0.0], [7.0], [31.0]], dtype=torch.float64)
    rows = cloud.rows([0, 3, 15])[[0, 3, 5]]
    for kernel in (ConnectionMatern(cloud, num_eigenpairs=20), AmbientKernel(cloud)):
        torch.testing.assert_close(kernel(numbers).to_dense(), kernel(rows).to_dense())


def test_smoothness_can_be_learnt(cloud: PointCloud) -> None:
    kernel = ConnectionMatern(cloud, 2.2, num_eigenpairs=20, trainable_nu=True)
    assert kernel.nu.item() == pytest.approx(2.2)
    assert "raw_nu" in dict(kernel.named_parameters())
    kernel.nu = 1.1
    assert kernel.nu.item() == pytest.approx(1.1)


@pytest.mark.parametrize("nu", [1.5, math.inf, None])
def test_gradients(cloud: PointCloud, nu: float | None) -> None:
    kernel = ConnectionMatern(cloud, nu or 1.5, num_eigenpairs=12, trainable_nu=nu is None)
    names = [n for n, _ in kernel.named_parameters()]

    raw = [p.detach().clone().requires_grad_() for p in kernel.parameters()]

    def of(*values: torch.Tensor) -> torch.Tensor:
        with torch.nn.utils.stateless._reparametrize_module(kernel, dict(zip(names, values, strict=True))):
            return kernel.spectral_weights()

    assert torch.autograd.gradcheck(of, raw)


class _Exact(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("kind", [ConnectionMatern, ProjectedMatern])
def test_gpytorch_regression_equals_ours(cloud: PointCloud, kind: type) -> None:
    """Evidence, mean and variance of gpytorch's exact GP, through its low-rank path."""
    kernel = kind(cloud, 1.5, num_eigenpairs=24)
    generator = torch.Generator().manual_seed(0)
    field = torch.linalg.cross(torch.tensor([[0.2, 0.3, 1.0]]).double().expand(200, 3), cloud.points)
    field = field + 0.1 * torch.randn(field.shape, generator=generator, dtype=torch.float64)
    train, test = range(0, 200, 2), range(1, 200, 2)
    gp = RVGP(cloud, kernel).fit(train, field[::2], optimize=False, learn_noise=False, noise_variance=0.01)
    gp.engine.log_amplitude.data.fill_(math.log(0.8))
    gp.engine.condition()
    x, y = cloud.rows(train), cloud.sites(train).to_tangent(field[::2]).flatten()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.01
    scaled = ScaleKernel(kernel).double()
    scaled.outputscale = 0.8
    model = _Exact(x, y, likelihood, scaled).double()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        model.train()
        evidence = likelihood(model(x)).log_prob(y)
    torch.testing.assert_close(gp.log_marginal_likelihood(), evidence, rtol=1e-8, atol=1e-6)
    model.eval()
    likelihood.eval()
    with torch.no_grad():
        posterior = model(cloud.rows(test))
    mean, cov = gp.predict(test)
    torch.testing.assert_close(
        cloud.sites(test).to_tangent(mean).flatten(), posterior.mean, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        cov.diagonal(dim1=1, dim2=2).flatten(), posterior.variance, rtol=1e-5, atol=1e-7
    )


def test_a_user_s_kernel_needs_two_methods(cloud: PointCloud) -> None:
    class Rotations(FeatureKernel):
        """Rotations of the sphere about all axes."""

        def features(self, sites):
            axes = torch.eye(3).double()
            fields = torch.linalg.cross(
                axes[None].expand(len(sites), 3, 3), sites.points[:, None].expand(-1, 3, 3)
            )
            return torch.einsum("qda,qkd->qak", sites.frames, fields)

        def spectral_weights(self):
            return torch.ones(3).double()

    spin = torch.linalg.cross(torch.tensor([[0.2, 0.3, 1.0]]).double().expand(200, 3), cloud.points)
    mean, _ = RVGP(cloud, Rotations(cloud)).fit(range(10), spin[:10]).predict(range(200))
    assert (mean - spin).norm() < 0.05 * spin.norm()


def test_bad_kernels(cloud: PointCloud) -> None:
    for nu in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidInputError, match="nu must be positive"):
            ConnectionMatern(cloud, nu)
    with pytest.raises(InvalidInputError, match="infinite nu can't be learnt"):
        ConnectionMatern(cloud, math.inf, trainable_nu=True)
    with pytest.raises(InvalidInputError, match="at most 400"):
        ConnectionMatern(cloud, num_eigenpairs=401)
    small = PointCloud(random_sphere(60), 12, dim=2)
    assert ConnectionMatern(small).spectral_weights().shape == (120,)
    with pytest.raises(InvalidInputError, match="at most 120"):
        ConnectionMatern(small, num_eigenpairs=300)
    with pytest.raises(InvalidInputError, match="num_eigenpairs"):
        ConnectionMatern(cloud, num_eigenpairs=0)
    with pytest.raises(InvalidInputError, match=r"0.5, 1.5, 2.5 or inf"):
        AmbientKernel(cloud, 1.0)
    with pytest.raises(InvalidInputError, match="no product"):
        ConnectionMatern(cloud, num_eigenpairs=4) * ProjectedMatern(cloud, num_eigenpairs=4)
    kernel = ConnectionMatern(cloud, num_eigenpairs=4)
    with pytest.raises(ShapeError, match="rows don't fit"):
        kernel.row_features(torch.zeros(3, 4))
    with pytest.raises(InvalidInputError, match="components lie outside"):
        kernel.row_features(torch.tensor([[400.0]]))


def test_a_smoothness_that_is_learnt_is_saved(tmp_path) -> None:
    points = fibonacci_sphere(100)
    cloud = PointCloud(points, dim=2)
    spin = np.cross([0.2, 0.4, 1.0], points)
    gp = RVGP(cloud, kernel=ConnectionMatern(cloud, trainable_nu=True)).fit(range(0, 100, 2), spin[::2])
    sd.save(gp, tmp_path / "field")
    again = sd.load(tmp_path / "field")
    assert again.kernel.trainable_nu
    torch.testing.assert_close(again.predict_mean(range(100)), gp.predict_mean(range(100)))
