"""Zeros and their indices: Poincaré and Hopf, and a hidden vortex found with an honest band."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import RVGP, PointCloud, field_index, find_singularities, triangulate
from tests.vectorfields.shapes import fibonacci_sphere, icosphere, klein_bottle, torus


def any_field(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.sin(2 * x[:, 1]), x[:, 2] - 0.3, torch.cos(x[:, 0])], -1)


@pytest.mark.parametrize(
    ("cloud", "characteristic"),
    [
        (PointCloud(fibonacci_sphere(400), 10, dim=2), 2),
        (PointCloud(fibonacci_sphere(400) * np.array([1.0, 1.0, 1.4]), 10, dim=2), 2),
        (PointCloud(torus(1000), 14, dim=2), 0),
        (PointCloud.from_mesh(*icosphere(2)), 2),
    ],
)
def test_indices_sum_to_the_euler_characteristic(cloud: PointCloud, characteristic: int) -> None:
    n = len(cloud)
    gp = RVGP(cloud, "ambient").fit(
        range(n),
        project(cloud, any_field(cloud.points)),
        optimize=False,
        learn_noise=False,
        noise_variance=1e-4,
    )
    zeros = find_singularities(gp, draws=3, generator=torch.Generator().manual_seed(0))
    assert zeros.mean_index.sum() == characteristic
    assert (zeros.mean_index.abs() <= 1).all()
    if n < 1000:
        assert len(triangulate(cloud)) == pytest.approx(2 * n - 2 * characteristic, rel=0.02)
        assert (zeros.draw_index.sum(1) == characteristic).all()


def project(cloud: PointCloud, v: torch.Tensor) -> torch.Tensor:
    sites = cloud.sites(slice(None))
    return sites.to_ambient(sites.to_tangent(v))


def ring_of(cloud: PointCloud, centre: torch.Tensor, angle: float) -> list[int]:
    """Nodes nearest to a circle around a point of the sphere, in order."""
    a = torch.linalg.cross(centre, torch.tensor([0.3, 0.1, 0.9]).double())
    a = a / a.norm()
    b = torch.linalg.cross(centre, a)
    nodes: list[int] = []
    for t in torch.linspace(0, 2 * torch.pi, 60)[:-1]:
        x = np.cos(angle) * centre + np.sin(angle) * (t.cos() * a + t.sin() * b)
        node = int((cloud.points - x).norm(dim=1).argmin())
        if not nodes or nodes[-1] != node:
            nodes.append(node)
    return nodes[:-1] if nodes[-1] == nodes[0] else nodes


def test_index_around_loops() -> None:
    cloud = PointCloud(fibonacci_sphere(600), 10, dim=2)
    pole = torch.tensor([0.2, -0.1, 1.0]).double()
    pole = pole / pole.norm()
    x = cloud.points
    vortex = torch.linalg.cross(pole.expand_as(x), x)
    a = torch.linalg.cross(pole, torch.tensor([1.0, 0.0, 0.0]).double())
    b = torch.linalg.cross(pole, a)
    saddle = project(cloud, (x @ a)[:, None] * a - (x @ b)[:, None] * b)
    loop = ring_of(cloud, pole, 0.5)
    assert field_index(cloud, vortex, loop) == 1
    assert field_index(cloud, vortex, loop[::-1]) == 1
    assert field_index(cloud, project(cloud, -pole.expand_as(x)), loop) == 1
    assert field_index(cloud, saddle, loop) == -1
    equator = ring_of(cloud, b / b.norm(), 0.5)
    assert field_index(cloud, vortex, equator) == 0
    both = field_index(cloud, torch.stack([vortex, saddle])[:, loop], loop)
    assert both.tolist() == [1, -1]


def test_a_hidden_vortex_is_found_with_a_calibrated_band() -> None:
    """Killing fields with random axes, seen with noise outside a cap around their zero.

    In the cap the draws' total index is 1, and the 95 % bands hold the truth 95 % of the time.
    """
    cloud = PointCloud(fibonacci_sphere(500), 10, dim=2)
    pole = torch.tensor([0.0, 0.0, 1.0]).double()
    hole = cloud.points[:, 2] > np.cos(0.5)
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    axes[0] = pole
    truth = torch.linalg.cross(axes[:, None].expand(60, 500, 3), cloud.points.expand(60, 500, 3))
    noise = project(cloud, 0.2 * torch.randn(truth.shape, generator=generator, dtype=torch.float64))
    gp = RVGP(cloud, num_eigenpairs=100, nu=np.inf).fit(~hole, (truth + noise)[:, ~hole])
    mean, cov = gp.predict(hole)
    gap = cloud.sites(hole).to_tangent(mean - truth[:, hole]).abs()
    inside = (gap < 1.96 * cov.diagonal(dim1=1, dim2=2).sqrt()).double().mean()
    assert abs(inside - 0.95) < 0.03
    one = RVGP(cloud, gp.kernel).fit(
        ~hole, (truth + noise)[0, ~hole], optimize=False, noise_variance=gp.noise_variance
    )
    one.engine.log_amplitude.data.copy_(gp.engine.log_amplitude.data)
    one.engine.condition()
    zeros = find_singularities(one, draws=200, generator=generator)
    total, places = zeros.around(pole, 0.5)
    assert (total == 1).double().mean() > 0.95
    spread = places - places.mean(0)
    # the true zero lies within the cloud of the draws' zeros
    distance = (
        (pole - places.mean(0))[:2]
        @ torch.linalg.inv(spread[:, :2].T @ spread[:, :2] / len(spread))
        @ (pole - places.mean(0))[:2]
    )
    assert distance < 13.8  # 99.9 % of a chi-square of two degrees of freedom
    assert (zeros.positions()[0] - pole).norm(dim=1).min() < 0.2


def test_what_has_no_index() -> None:
    bottle = PointCloud(klein_bottle(14), 8, dim=2)
    with pytest.raises(InvalidInputError, match="not orientable"):
        triangulate(bottle)
    cloud = PointCloud(fibonacci_sphere(100), 8, dim=2)
    with pytest.raises(InvalidInputError, match="three nodes"):
        field_index(cloud, cloud.points, [0, 1])
    gp = RVGP(cloud, num_eigenpairs=20).fit(range(10), torch.zeros(2, 10, 3))
    with pytest.raises(InvalidInputError, match="many fields"):
        find_singularities(gp)
