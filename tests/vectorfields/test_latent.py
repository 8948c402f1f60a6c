"""The bound of noisily observed trajectories: under the exact evidence, close to it, and a guide to the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError
from stochdyn.vectorfields import RVGP, PointCloud, TrajectoryELBO


@pytest.fixture(scope="module")
def plane() -> PointCloud:
    """A square lattice, where a linear field is interpolated exactly."""
    grid = np.stack(np.meshgrid(*[np.linspace(-3, 3, 13)] * 2), -1).reshape(-1, 2)
    grid = grid + 0.01 * np.random.default_rng(0).normal(size=grid.shape)
    return PointCloud(grid, 8, dim=2, frames=np.tile(np.eye(2), (169, 1, 1)))


MATRIX = torch.tensor([[-0.8, 1.0], [-1.0, -0.8]]).double()


def readings(seed: int, paths: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = torch.linspace(0, 2, 9).double()
    law = sd.DiffusionMeasure(
        torch.tensor([1.5, 0.0]).double().expand(paths, 2), sd.SDE(lambda t, x: x @ MATRIX.T, 0.5)
    )
    generator = torch.Generator().manual_seed(seed)
    x = law.sample(torch.linspace(0, 2, 33).double(), generator=generator).x[:, ::4]
    return times, x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def test_bound_is_near_the_exact_evidence(plane: PointCloud) -> None:
    """The exact evidence is that of the Euler scheme, by a Kalman filter written as one joint Gaussian."""
    gp = RVGP(plane, "projected", num_eigenpairs=60).fit(
        range(169), plane.points @ MATRIX.T, optimize=False, noise_variance=1e-6
    )
    times, y = readings(0, 2)
    objective = TrajectoryELBO(gp, times, y, 0.1, diffusion=0.5, steps=4, learn_field=False, num_particles=64)
    objective.drift.vectors = plane.points @ MATRIX.T
    step = 2 / 32
    jump = torch.eye(2).double() + step * MATRIX
    exact = 0.0
    for series in y:
        mean, cov, total = series[0], 0.01 * torch.eye(2).double(), 0.0
        for reading in series[1:]:
            for _ in range(4):
                mean, cov = jump @ mean, jump @ cov @ jump.T + 0.25 * step * torch.eye(2).double()
            law = torch.distributions.MultivariateNormal(mean, cov + 0.01 * torch.eye(2).double())
            total = total + law.log_prob(reading)
            gain = cov @ torch.linalg.inv(law.covariance_matrix)
            mean, cov = mean + gain @ (reading - mean), cov - gain @ cov
        exact = exact + total
    torch.manual_seed(0)
    with torch.no_grad():
        bounds = torch.stack([objective().terms["elbo"] for _ in range(6)])
    error = bounds.std() / 6**0.5
    assert bounds.mean() < exact + 4 * error
    assert (
        bounds.mean() > exact - 0.1 * y[:, 1:].numel()
    )  # before any training, a tenth of a nat a number read
    with torch.no_grad():
        evidence, log_weights = objective.paths.evidence(1500)
    weights = (log_weights - log_weights.max(0).values).exp()
    errors = weights.std(0) / weights.mean(0) / 1500**0.5
    assert abs(evidence.sum() - exact) < 4.5 * errors.norm()


def test_the_field_is_learnt_through_the_noise(plane: PointCloud) -> None:
    times, y = readings(1, 8)
    gp = RVGP(plane, "projected", num_eigenpairs=12).fit_paths((times, y), diffusion=0.6)
    objective = TrajectoryELBO(gp, times, y, 0.1, diffusion=0.5, steps=2, num_particles=2)
    result = sd.fit(objective, None, steps=25, lr=0.03, progress=False)
    first, last = result.losses[:6].mean(), result.losses[-6:].mean()
    assert last < first
    near = plane.points.norm(dim=1) < 1.2
    truth = (plane.points @ MATRIX.T)[near]
    assert (objective.vectors()[near] - truth).norm() < 0.5 * truth.norm()
    assert objective().bound == "evidence_lower"


def test_bad_readings(plane: PointCloud) -> None:
    times, y = readings(0, 2)
    gp = RVGP(plane, num_eigenpairs=20)
    with pytest.raises(InvalidInputError, match="must be fitted"):
        TrajectoryELBO(gp, times, y, 0.1)
    gp.fit(range(169), plane.points)
    with pytest.raises(ShapeError, match="axis -2"):
        TrajectoryELBO(gp, times[:5], y, 0.1)
    with pytest.raises(ShapeError, match="axis -1"):
        TrajectoryELBO(gp, times, y[..., :1], 0.1)
    with pytest.raises(InvalidInputError, match="obs_scale"):
        TrajectoryELBO(gp, times, y, 0.0)
    y = y.clone()
    y[0, 3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="values"):
        TrajectoryELBO(gp, times, y, 0.1)
