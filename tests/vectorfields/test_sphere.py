"""Exact kernels on the sphere: orthonormality, addition theorem, divergence and curl, Weitzenböck's shift."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import RVGP, ConnectionMatern, HodgeMatern, PointCloud, hodge_compositional
from stochdyn.vectorfields.geometry import sphere_of, vector_harmonics
from tests.vectorfields.shapes import fibonacci_sphere, random_sphere, sphere_frames, torus


def test_gradients_of_spherical_harmonics() -> None:
    """Against differences of scipy's spherical harmonics, and at the poles."""
    points = torch.as_tensor(np.concatenate([random_sphere(40), [[0, 0, 1.0], [0, 0, -1.0]]]))
    got = vector_harmonics(points, 5)

    def harmonic(x: np.ndarray, l: int, m: int) -> np.ndarray:  # noqa: E741
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        y = sph_harm_y(l, abs(m), np.arccos(x[:, 2]), np.arctan2(x[:, 1], x[:, 0]))
        if m == 0:
            return y.real
        return math.sqrt(2) * (-1) ** m * (y.real if m > 0 else y.imag)

    column, h = 0, 1e-6
    for l in range(1, 6):  # noqa: E741
        for m in range(-l, l + 1):
            slope = np.stack(
                [
                    (harmonic(points.numpy() + h * e, l, m) - harmonic(points.numpy() - h * e, l, m))
                    / (2 * h)
                    for e in np.eye(3)
                ],
                1,
            )
            slope /= math.sqrt(l * (l + 1))
            np.testing.assert_allclose(got[:40, :, column], slope[:40], atol=1e-8)
            # differences of polar coordinates are rough at the poles themselves
            np.testing.assert_allclose(got[40:, :, column], slope[40:], atol=1e-4)
            column += 1
    assert column == got.shape[-1]


def test_addition_theorem() -> None:
    """The squared lengths of degree l sum to (2 l + 1) / 4 pi everywhere, up to high degrees."""
    field = vector_harmonics(torch.as_tensor(random_sphere(20)), 25)
    sums = torch.stack(
        [part.square().sum((1, 2)) for part in field.split([2 * l + 1 for l in range(1, 26)], -1)]  # noqa: E741
    )
    expected = torch.tensor([(2 * l + 1) / (4 * math.pi) for l in range(1, 26)])[:, None].double()  # noqa: E741
    torch.testing.assert_close(sums, expected.expand_as(sums))


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    points = fibonacci_sphere(400)
    return PointCloud(2.0 * points + 1.0, 10, frames=sphere_frames(points))


@pytest.mark.parametrize("part", ["both", "divergence_free", "curl_free"])
@pytest.mark.parametrize("nu", [1.5, math.inf])
def test_variance_is_one_everywhere(cloud: PointCloud, part: str, nu: float) -> None:
    kernel = HodgeMatern(cloud, nu, 10, part)
    variance = kernel(cloud.rows(range(50)), diag=True).reshape(50, 2)
    torch.testing.assert_close(variance.sum(1), torch.full((50,), 2.0).double())
    if part == "both":
        torch.testing.assert_close(variance, torch.ones(50, 2).double())


def test_exact_kernel_is_the_limit_of_the_connection_kernel() -> None:
    """The gap falls like the squared width of the neighbourhoods, here to 3/8; 300 modes of degree 12 are out of sight."""
    gaps = []
    for n, neighbors in ((400, 10), (3200, 30)):
        points = fibonacci_sphere(n)
        cloud = PointCloud(points, neighbors, frames=sphere_frames(points))
        exact = HodgeMatern(cloud, math.inf, 12, laplacian="bochner")
        graph = ConnectionMatern(cloud, math.inf, num_eigenpairs=160)
        exact.lengthscale = graph.lengthscale = 0.5
        x = cloud.rows(range(0, n, n // 50))
        gaps.append((exact(x, x).to_dense() - graph(x, x).to_dense()).detach())
    first, second = (gap.square().mean().sqrt() for gap in gaps)
    assert second < 0.45 * first
    assert gaps[1].abs().max() < 0.02


def test_hodge_and_bochner_predict_alike(cloud: PointCloud) -> None:
    """Weitzenböck: on the sphere their eigenvalues differ by a constant, which a Matérn length scale absorbs."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    sites = cloud.sites(range(100))
    data = sites.to_ambient(sites.to_tangent(data))
    means = []
    for laplacian, shift in (("hodge", 0.0), ("bochner", 0.25)):
        kernel = HodgeMatern(cloud, 1.5, 10, laplacian=laplacian)
        kernel.lengthscale = torch.tensor(3.0 / (3.0 / 0.6**2 + shift)).double().sqrt()
        gp = RVGP(cloud, kernel).fit(range(100), data, optimize=False, learn_noise=False, noise_variance=0.1)
        means.append(gp.predict(range(400))[0])
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-8)


def test_parts_have_no_divergence_and_no_curl(cloud: PointCloud) -> None:
    """By the divergence theorem over triangles: the flux through, and the circulation along, every small loop."""
    generator = torch.Generator().manual_seed(0)
    for part in ("divergence_free", "curl_free"):
        kernel = HodgeMatern(cloud, 2.5, 4, part)
        weights = torch.randn(24, generator=generator, dtype=torch.float64)
        angle = torch.arange(64).double() * 2 * torch.pi / 64
        for centre in torch.as_tensor(random_sphere(5)):
            frame = torch.as_tensor(sphere_frames(centre[None].numpy()))[0]
            outward = angle.cos()[:, None] * frame[:, 0] + angle.sin()[:, None] * frame[:, 1]
            along = angle.cos()[:, None] * frame[:, 1] - angle.sin()[:, None] * frame[:, 0]
            ring = math.cos(0.3) * centre + math.sin(0.3) * outward
            normal = math.cos(0.3) * outward - math.sin(0.3) * centre
            gradient = vector_harmonics(ring, 4)
            field = gradient @ weights
            if part == "divergence_free":
                field = torch.linalg.cross(ring, field)
            through = (field * normal).sum(-1).mean()
            around = (field * along).sum(-1).mean()
            assert abs(through if part == "divergence_free" else around) < 1e-12
            assert abs(around if part == "divergence_free" else through) > 1e-3
        assert kernel.features(cloud.sites([0])).shape == (1, 2, 24)


def test_compositional_kernel_finds_the_parts(cloud: PointCloud) -> None:
    spin = torch.linalg.cross(torch.tensor([[0.1, 0.2, 1.0]]).double().expand(400, 3), cloud.points - 1.0)
    gp = RVGP(cloud, hodge_compositional(cloud, 2.5, 6)).fit(range(0, 400, 4), spin[::4])
    rotation, source = (part.outputscale.item() for part in gp.kernel.kernels)
    assert rotation > 20 * source
    assert (gp.predict(range(400))[0] - spin).norm() < 0.01 * spin.norm()


def test_spheres_are_recognised() -> None:
    centre, radius = sphere_of(torch.as_tensor(3.0 * random_sphere(50) + 2.0))
    assert radius == pytest.approx(3.0)
    torch.testing.assert_close(centre, torch.full((3,), 2.0).double())
    assert sphere_of(torch.as_tensor(torus(50))) is None
    assert sphere_of(torch.as_tensor(random_sphere(50, 3))) is None
    flat = torch.as_tensor(np.random.default_rng(0).random((50, 3)) * [1, 1, 0])
    assert sphere_of(flat) is None
    with pytest.raises(InvalidInputError, match="don't lie on a sphere"):
        HodgeMatern(PointCloud(torus(300), 12, 2))
    with pytest.raises(InvalidInputError, match="part is unknown"):
        HodgeMatern(PointCloud(fibonacci_sphere(60), 8, 2), part="banana")
