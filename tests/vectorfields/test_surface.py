"""Between the nodes: projection of third order, fields as drifts, derivatives, and SDEs that stay on the manifold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError
from stochdyn.vectorfields import PointCloud, Surface, TangentDiffusion, TangentDrift
from tests.vectorfields.shapes import clifford_torus, fibonacci_sphere, random_sphere


def spin(points: torch.Tensor) -> torch.Tensor:
    axis = torch.tensor([0.3, -0.5, 1.0], dtype=points.dtype)
    return torch.linalg.cross(axis.expand_as(points), points)


def test_projection_is_of_high_order() -> None:
    """On the sphere the height of the manifold over the foot of a point: error falls like spacing to the fourth."""
    new = torch.as_tensor(random_sphere(200, seed=1))
    errors = []
    for n in (400, 1600):
        surface = Surface(PointCloud(fibonacci_sphere(n), 10, dim=2))
        found = surface.project(new * 1.02)
        errors.append(float((found.norm(dim=1) - 1).abs().mean()))
    assert errors[1] < 3e-5
    assert errors[0] / errors[1] > 8


def test_projection_keeps_shape_and_precision() -> None:
    surface = Surface(PointCloud(clifford_torus(24), 10, dim=2))
    x = torch.as_tensor(clifford_torus(24)[:6] * 1.01).float().reshape(2, 3, 4)
    found = surface.project(x, max_iterations=2)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[..., :2].norm(dim=-1), torch.ones(2, 3), rtol=0, atol=5e-3)


def test_drift_interpolates_the_field() -> None:
    points = fibonacci_sphere(1000)
    drift = TangentDrift(PointCloud(points, 10, dim=2), spin(torch.as_tensor(points)))
    new = torch.as_tensor(random_sphere(100, seed=2))
    torch.testing.assert_close(drift(torch.tensor(0.0), new), spin(new), rtol=0, atol=0.02)
    torch.testing.assert_close(
        drift(torch.tensor(0.0), new.reshape(5, 20, 3)).reshape(100, 3), drift(0.0, new)
    )
    assert drift(torch.tensor(0.0), new.float()).dtype == torch.float32


def test_drift_is_differentiable_in_the_state() -> None:
    points = fibonacci_sphere(500)
    cloud = PointCloud(points, 10, dim=2)
    x = torch.as_tensor(random_sphere(3, seed=2)).requires_grad_()
    drift = TangentDrift(cloud, spin(torch.as_tensor(points)), dt=0.1)
    assert torch.autograd.gradcheck(lambda x: drift(torch.tensor(0.0), x), (x,), eps=1e-7, atol=1e-4)


def test_paths_stay_on_the_manifold_and_have_its_law() -> None:
    """Brownian motion on the unit sphere: the mean of the height decays like exp(-sigma² t)."""
    cloud = PointCloud(fibonacci_sphere(600), 10, dim=2)
    step, sigma, n = 0.02, 0.6, 2000
    still = TangentDrift(cloud, torch.zeros(600, 3).double(), step)
    sde = sd.SDE(still, TangentDiffusion(cloud, sigma))
    start = torch.tensor([0.0, 0.0, 1.0]).double().expand(n, 3)
    ts = torch.arange(0, 1.01, step).double()
    path = sd.DiffusionMeasure(start, sde).sample(ts, generator=torch.Generator().manual_seed(0))
    off = (path.x.norm(dim=-1) - 1).abs()
    # one step of noise leaves the sphere by half its square, sigma² step
    assert off[:, 1:].mean() < 1.5 * sigma**2 * step
    height = path.x[:, -1, 2]
    expected = np.exp(-(sigma**2) * 1.0)
    assert abs(height.mean() - expected) < 4.5 * height.std() / n**0.5 + 0.01


def test_rotation_returns_to_its_start() -> None:
    points = fibonacci_sphere(800)
    step = 2 * np.pi / 800
    axis = torch.tensor([0.0, 0.0, 1.0]).double()
    field = torch.linalg.cross(axis.expand(800, 3), torch.as_tensor(points))
    drift = TangentDrift(PointCloud(points, 10, dim=2), field, step)
    x = torch.tensor([[0.8, 0.0, 0.6]]).double()
    for _ in range(800):
        x = x + step * drift(torch.tensor(0.0), x)
    torch.testing.assert_close(x, torch.tensor([[0.8, 0.0, 0.6]]).double(), rtol=0, atol=0.02)


def test_bad_input() -> None:
    cloud = PointCloud(fibonacci_sphere(100), 8, dim=2)
    with pytest.raises(InvalidInputError, match="dt must be positive"):
        TangentDrift(cloud, torch.zeros(100, 3), dt=0.0)
    with pytest.raises(InvalidInputError, match="diffusion must be positive"):
        TangentDiffusion(cloud, -1.0)
    with pytest.raises(ShapeError, match="x has the wrong size"):
        TangentDrift(cloud, torch.zeros(100, 3))(torch.tensor(0.0), torch.zeros(4, 2))


def test_leaving_the_cloud_is_told_once() -> None:
    rng = np.random.default_rng(0)
    sheet = PointCloud(rng.uniform(-1, 1, (200, 2)), 10, dim=2)
    drift = TangentDrift(sheet, torch.ones(200, 2, dtype=torch.float64))
    inside = sd.DiffusionMeasure(torch.zeros(3, 2, dtype=torch.float64), sd.SDE(drift, 0.05))
    inside.sample(torch.linspace(0, 0.5, 11, dtype=torch.float64), generator=0)  # warnings are errors here
    with pytest.warns(ApproximationWarning, match="off the cloud") as told:
        inside.sample(torch.linspace(0, 3, 61, dtype=torch.float64), generator=0)
    assert len({str(w.message) for w in told}) == 1
