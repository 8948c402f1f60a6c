"""Importance weights turn the linearised transition into that of the nonlinear process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.bridges import SchrodingerBridge, Snapshots
from stochdyn.bridges.laws import (
    FixedDrift,
    LinearisedTransition,
    effective_share,
    log_correction,
    weighted_paths,
)

F64 = torch.float64
SIGMA, HORIZON = 0.8, 0.8
SPREAD = torch.tensor([[SIGMA**2]], dtype=F64)


def well(t: Tensor, x: Tensor) -> Tensor:
    """Two wells at plus and minus one."""
    return 2 * (x - x**3)


def chapman_kolmogorov(start: float, points: int = 801, steps: int = 800) -> tuple[Tensor, Tensor]:
    """Density at the horizon by powers of a short transition on a grid."""
    grid = torch.linspace(-3, 3, points, dtype=F64)
    h = HORIZON / steps
    # second order in the step: drift and its derivative from the trapezoidal Gaussian
    mean = grid + h * well(torch.tensor(0.0), grid + 0.5 * h * well(torch.tensor(0.0), grid))
    kernel = torch.exp(-0.5 * (grid[None] - mean[:, None]) ** 2 / (SIGMA**2 * h))
    kernel = kernel / kernel.sum(1, keepdim=True)
    density = torch.zeros(points, dtype=F64)
    density[int((grid - start).abs().argmin())] = 1.0
    for _ in range(steps):
        density = density @ kernel
    return grid, density / float(grid[1] - grid[0])


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    grid, density = chapman_kolmogorov(0.2)
    ends = torch.tensor([-1.0, -0.4, 0.2, 0.8, 1.2], dtype=F64)
    return ends, density[[int((grid - e).abs().argmin()) for e in ends]].log()


def _kernel(ends: Tensor, corrections: int) -> Tensor:
    part = LinearisedTransition(FixedDrift(well, 1), SPREAD, 0.0, HORIZON, 0.02, corrections=corrections)
    return part.log_kernel(torch.tensor([[0.2]], dtype=F64), ends[:, None])[0]


def test_corrected_densities_solve_chapman_and_kolmogorov(truth) -> None:
    ends, exact = truth
    plain = (_kernel(ends, 0) - exact).abs()
    corrected = (_kernel(ends, 2000) - exact).abs()
    assert float(plain.max()) > 0.15
    assert float(corrected.max()) < 0.05


def test_weights_of_an_affine_drift_are_one() -> None:
    family = FixedDrift(lambda t, x: 0.5 - 0.7 * x, 1)
    part = LinearisedTransition(family, SPREAD, 0.0, 1.0, 0.1)
    x, y = torch.tensor([[0.3], [1.0]], dtype=F64), torch.tensor([[0.1], [-1.0]], dtype=F64)
    chain = part.chain(x, y)
    states, kicks, weights = weighted_paths(family, chain, x.mT.contiguous(), y.mT.contiguous(), 8, None)
    assert states.shape == (8, len(part.ts), 1, 2)
    assert kicks.shape == (8, len(part.ts) - 1, 1, 2)
    torch.testing.assert_close(weights, torch.zeros_like(weights), atol=1e-10, rtol=0)
    torch.testing.assert_close(log_correction(weights), torch.zeros(2, dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(effective_share(weights), torch.ones(2, dtype=F64))


def test_corrected_trajectories_have_the_law_of_the_pinned_process() -> None:
    """The middle of a path from 0 to 0 in a double well, by Chapman and Kolmogorov: p(x|0) p(0|x), symmetric wells."""
    grid = torch.linspace(-2.5, 2.5, 401, dtype=F64)
    h, steps = 0.0025, 160
    mean = grid + h * well(torch.tensor(0.0), grid + 0.5 * h * well(torch.tensor(0.0), grid))
    kernel = torch.exp(-0.5 * (grid[None] - mean[:, None]) ** 2 / (SIGMA**2 * h))
    kernel = kernel / kernel.sum(1, keepdim=True)
    middle = int(grid.abs().argmin())
    ahead = torch.zeros(401, dtype=F64)
    ahead[middle] = 1.0
    back = ahead.clone()
    for _ in range(steps):
        ahead, back = ahead @ kernel, kernel @ back
    law = ahead * back / (ahead @ back)
    variance = float(law @ grid**2)
    zero = torch.zeros(3, 1, dtype=F64)
    n, spreads = 4000, {}
    for corrections in (0, 16):
        bridge = SchrodingerBridge(
            Snapshots([0.0, 2 * h * steps], [zero, zero]), well, SIGMA, dt=0.02, corrections=corrections
        ).solve()
        path = bridge.sample(torch.tensor([0.0, h * steps], dtype=F64), n, torch.Generator().manual_seed(0))
        spreads[corrections] = float(path.x[:, -1].var())
    error = variance * math.sqrt(2 / n)
    assert abs(spreads[16] - variance) < 4.5 * error + 0.02 * variance
    assert abs(spreads[0] - variance) > abs(spreads[16] - variance)
