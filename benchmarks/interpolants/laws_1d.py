"""Laws of the reverse ODE and SDE of a learned score on the line, without Monte Carlo error."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from stochdyn.interpolants import NoisedMixture

Score = Callable[[Tensor, Tensor], Tensor]
BOX, CELLS = (-4.5, 4.5), 1200
LEVELS = (np.arange(2000) + 0.5) / 2000


@torch.no_grad()
def ode_quantiles(truth: NoisedMixture, score: Score, steps: int = 300) -> np.ndarray:
    """Quantiles of the probability-flow ODE: on the line its flow keeps the order, so it carries those of the prior."""
    process = truth.process
    times = process.grid(steps)
    x = torch.from_numpy(grid_quantiles(*grid_density(truth, process.horizon)))[:, None]

    def slope(t: Tensor, x: Tensor) -> Tensor:
        s = score(t.float(), x.float()).double()
        return process.drift(t, x) - 0.5 * process.squared_diffusion(t) * s

    for t, s in itertools.pairwise(times):
        h = s - t
        k1 = slope(t, x)
        k2 = slope(t + h / 2, x + h / 2 * k1)
        k3 = slope(t + h / 2, x + h / 2 * k2)
        k4 = slope(s, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x[:, 0].numpy()


def grid_density(truth: NoisedMixture, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the cells of the grid, and the true density at a time there."""
    edges = torch.linspace(*BOX, CELLS + 1, dtype=torch.float64)
    centers = 0.5 * (edges[1:] + edges[:-1])
    density = truth.log_prob(torch.tensor(t, dtype=torch.float64), centers[:, None]).exp()
    return centers.numpy(), density.numpy()


@torch.no_grad()
def sde_density(truth: NoisedMixture, score: Score, steps: int = 500) -> np.ndarray:
    """Density of the reverse SDE on a grid: exponentially fitted finite volumes, two implicit stages a step."""
    process = truth.process
    edges = torch.linspace(*BOX, CELLS + 1, dtype=torch.float64)
    width, cells = (BOX[1] - BOX[0]) / CELLS, CELLS
    times = process.grid(steps)
    p = grid_density(truth, process.horizon)[1]
    gamma = 1 - np.sqrt(0.5)  # L-stable, second order (SDIRK2)

    def bands(t: Tensor) -> np.ndarray:
        g2 = process.squared_diffusion(t).item()
        inner = edges[1:-1, None]
        drift = g2 * score(t.float(), inner.float()).double() - process.drift(
            t, inner
        )  # on the reversed clock
        v, diffusion = drift[:, 0].numpy(), 0.5 * g2
        peclet = v * width / diffusion
        b = np.where(
            np.abs(peclet) < 1e-8, 1 - peclet / 2, peclet / np.expm1(np.where(peclet == 0, 1, peclet))
        )
        right, left = (
            diffusion / width * b,
            diffusion / width * (b + peclet),
        )  # flux = left p_i - right p_{i+1}
        matrix = np.zeros((3, cells))
        matrix[0, 1:], matrix[2, :-1] = right, left
        matrix[1, :-1] -= left
        matrix[1, 1:] -= right
        return matrix / width

    for t, s in itertools.pairwise(times):
        h = (t - s).item()
        first = bands(t - gamma * h)
        system = -gamma * h * first
        system[1] += 1
        k1 = solve_banded((1, 1), system, _apply(first, p))
        last = bands(s)
        system = -gamma * h * last
        system[1] += 1
        k2 = solve_banded((1, 1), system, _apply(last, p + (1 - gamma) * h * k1))
        p = p + h * ((1 - gamma) * k1 + gamma * k2)
    return p


def _apply(matrix: np.ndarray, p: np.ndarray) -> np.ndarray:
    out = matrix[1] * p
    out[:-1] += matrix[0, 1:] * p[1:]
    out[1:] += matrix[2, :-1] * p[:-1]
    return out


def grid_quantiles(centers: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Quantiles of a density on a grid of cells."""
    width = centers[1] - centers[0]
    mass = np.concatenate([[0.0], np.cumsum(np.clip(density, 0, None))])
    edges = np.concatenate([[centers[0] - width / 2], centers + width / 2])
    return np.interp(LEVELS, mass / mass[-1], edges)


def w2(a: np.ndarray, b: np.ndarray) -> float:
    """Distance between two laws from their quantiles."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def evaluate(truth: NoisedMixture, score: Score) -> dict[str, float]:
    """Distances between truth, ODE and SDE at the start time."""
    truth, process = truth.double(), truth.process
    sde = sde_density(truth, score)
    centers, exact = grid_density(truth, process.start)
    q_sde, q_true = grid_quantiles(centers, sde), grid_quantiles(centers, exact)
    q_ode = ode_quantiles(truth, score)
    width = centers[1] - centers[0]
    p, q = exact / (exact.sum() * width), np.clip(sde, 1e-300, None)
    return {
        "gap": w2(q_ode, q_sde),
        "ode": w2(q_ode, q_true),
        "sde": w2(q_sde, q_true),
        "kl_sde": float((p * np.log(np.clip(p, 1e-300, None) / q)).sum() * width),
    }
