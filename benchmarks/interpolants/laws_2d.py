"""Laws of the reverse ODE and SDE of a learned score in the plane, as histograms without Monte Carlo error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from stochdyn.diagnostics import emd
from stochdyn.interpolants import AffineProcess, exponential_ode

Score = Callable[[Tensor, Tensor], Tensor]

BOUND, BINS = 3.5, 64  # the histogram in which laws are compared
FINE = 2  # subcells a side of each bin, for the equation
MARGIN = 8  # bins beyond the histogram on every side
WIDTH = 2 * BOUND / BINS / FINE
SIDE = (BINS + 2 * MARGIN) * FINE
LOW = -BOUND - MARGIN * FINE * WIDTH


class Gaussian2d:
    """The law at the horizon: independent normals."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean.double(), std.double()

    def quasi(self, log2_points: int) -> Tensor:
        """Quasi-random points of equal weight."""
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
        u = sobol.draw_base2(log2_points, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return self.mean + self.std * torch.special.ndtri(u)

    def cells(self) -> np.ndarray:
        """Mass in each cell of the fine grid, ``(SIDE, SIDE)``."""
        edges = LOW + WIDTH * torch.arange(SIDE + 1, dtype=torch.float64)
        cdf = torch.special.ndtr((edges[:, None] - self.mean) / self.std)
        mass = cdf.diff(dim=0)
        return (mass[:, 0, None] * mass[None, :, 1]).numpy()


@torch.no_grad()
def ode_histogram(
    process: AffineProcess, score: Score, prior: Gaussian2d, log2_points: int = 18, steps: int = 60
) -> np.ndarray:
    """Histogram of the probability-flow ODE, from quasi-random starts, denoised at the end."""
    x = prior.quasi(log2_points).float()
    times = process.grid(steps)
    last = times[-1].float()
    parts = []
    for part in x.split(20_000):
        y = exponential_ode(process, score, part, times)
        parts.append(process.denoised(last, y, score(last, y)))
    edges = torch.linspace(-BOUND, BOUND, BINS + 1, dtype=torch.float64)
    return torch.histogramdd(torch.cat(parts).double(), [edges, edges]).hist.numpy()


@torch.no_grad()
def sde_histogram(process: AffineProcess, score: Score, prior: Gaussian2d, steps: int = 200) -> np.ndarray:
    """Histogram of the reverse SDE by its Fokker-Planck equation, split by direction, denoised at the end."""
    times = process.grid(steps)
    p = prior.cells()
    edges = LOW + WIDTH * torch.arange(1, SIDE, dtype=torch.float64)
    middles = LOW + WIDTH * (torch.arange(SIDE, dtype=torch.float64) + 0.5)
    walls = torch.cartesian_prod(edges, middles)  # between neighbours along the first axis
    for t, s in itertools.pairwise(times):
        at, h = 0.5 * (t + s), (t - s).item()
        g2 = process.squared_diffusion(at).item()
        first = (g2 * _score(score, at, walls) - process.drift(at, walls))[:, 0]
        second = (g2 * _score(score, at, walls.flip(1)) - process.drift(at, walls.flip(1)))[:, 1]
        across, along = (
            v.numpy().reshape(SIDE - 1, SIDE).T for v in (first, second)
        )  # one line of walls a row
        p = _sweep(p.T, across, 0.5 * g2, 0.5 * h).T
        p = _sweep(p, along, 0.5 * g2, h)
        p = _sweep(p.T, across, 0.5 * g2, 0.5 * h).T
    points = torch.cartesian_prod(middles, middles)
    last = times[-1]
    moved = process.denoised(last, points, _score(score, last, points))
    return _deposit(moved.numpy(), p.ravel())


def _score(score: Score, t: Tensor, x: Tensor) -> Tensor:
    return torch.cat([score(t.float(), part.float()).double() for part in x.split(20_000)])


def _sweep(p: np.ndarray, v: np.ndarray, diffusion: float, h: float) -> np.ndarray:
    """Move mass along the last axis for a time ``h``: exponentially fitted fluxes, two L-stable implicit stages.

    ``p (lines, cells)`` and ``v (lines, cells - 1)``; all lines are one banded system without links between them.
    """
    peclet = v * WIDTH / diffusion
    safe = np.where(np.abs(peclet) < 1e-8, 1.0, peclet)
    b = np.where(np.abs(peclet) < 1e-8, 1 - peclet / 2, safe / np.expm1(safe))
    rate = diffusion / WIDTH**2
    right, left = rate * b, rate * (b + peclet)
    lines, cells = p.shape
    matrix = np.zeros((3, lines, cells))
    matrix[0, :, 1:], matrix[2, :, :-1] = right, left
    matrix[1, :, :-1] -= left
    matrix[1, :, 1:] -= right
    flat = matrix.reshape(3, -1)
    gamma = 1 - math.sqrt(0.5)
    system = -gamma * h * flat
    system[1] += 1
    q = p.ravel()
    k1 = solve_banded((1, 1), system, _apply(flat, q), check_finite=False)
    k2 = solve_banded((1, 1), system, _apply(flat, q + (1 - gamma) * h * k1), check_finite=False)
    return (q + h * ((1 - gamma) * k1 + gamma * k2)).reshape(p.shape)


def _apply(matrix: np.ndarray, p: np.ndarray) -> np.ndarray:
    out = matrix[1] * p
    out[:-1] += matrix[0, 1:] * p[1:]
    out[1:] += matrix[2, :-1] * p[:-1]
    return out


def _deposit(points: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Histogram of cells that moved as squares: each is shared by area between those that it now covers."""
    place = (points - LOW) / WIDTH - 0.5
    base = np.floor(place).astype(int)
    share = place - base
    fine = np.zeros((SIDE, SIDE))
    for i, j in itertools.product((0, 1), (0, 1)):
        weight = np.abs(1 - i - share[:, 0]) * np.abs(1 - j - share[:, 1])
        row, column = base[:, 0] + i, base[:, 1] + j
        inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
        np.add.at(fine, (row[inside], column[inside]), (weight * mass)[inside])
    keep = fine[MARGIN * FINE : -MARGIN * FINE, MARGIN * FINE : -MARGIN * FINE]
    return keep.reshape(BINS, FINE, BINS, FINE).sum((1, 3))


def histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein distance between two histograms."""
    middle = torch.linspace(-BOUND, BOUND, 2 * BINS + 1, dtype=torch.float64)[1::2]
    cells = torch.cartesian_prod(middle, middle)
    masses = [torch.from_numpy(np.clip(h, 0, None).ravel()) for h in (a, b)]
    used = [m > 1e-12 * m.sum() for m in masses]
    return emd(cells[used[0]], cells[used[1]], 2, masses[0][used[0]], masses[1][used[1]])
