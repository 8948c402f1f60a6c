"""Posteriors by quadrature: a grid that finds the mass, draws from it, and a hierarchy of Hurst indices above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from scipy.interpolate import RegularGridInterpolator
from scipy.special import expit, logit, logsumexp

from stochdyn.fractional.exact.likelihood import HURST_LIMITS
from stochdyn.fractional.hurst.marginal import Fit, marginal_of

__all__ = [
    "Grid",
    "Table",
    "draw_hierarchy",
    "draw_points",
    "find_grid",
    "interpolate",
    "interpolated_table",
    "log_uniform",
    "table_on",
]

LOGIT_LIMIT = float(logit(HURST_LIMITS[1]))
_DROP = 22.0  # log density below its peak at which the grid ends
_COARSE, _FINE, _FINE_PLANE = (21, 15), (61, 1), (41, 21)
_ROUNDS = 4


@dataclass
class Grid:
    """Nodes: ``x (I,)`` logits of the Hurst index, and ``a (J,)`` of the further parameter (one where there is none)."""

    x: np.ndarray
    a: np.ndarray

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Hurst indices and coordinates a of all pairs, ``(I J,)`` each."""
        x, a = np.meshgrid(self.x, self.a, indexing="ij")
        return expit(x.ravel()), a.ravel()


@dataclass
class Table:
    """One group of blocks on a grid.

    Attributes:
        log_marginal: ``(I, J)`` the marginal likelihood.
        quadratic: ``(I, J)``; free: degrees of freedom; fits: per block, with arrays ``(I J, ...)``.
    """

    grid: Grid
    log_marginal: np.ndarray
    quadratic: np.ndarray
    free: int
    fits: list[Fit]


def table_on(grid: Grid, fits: list[Fit], scale: np.ndarray | None) -> Table:
    """Put the fits of a group on its grid."""
    shape = (len(grid.x), len(grid.a))
    log_marginal, quadratic, free = marginal_of(fits, scale)
    return Table(grid, log_marginal.reshape(shape), quadratic.reshape(shape), free, fits)


def log_uniform(x: np.ndarray) -> np.ndarray:
    """Log density of the logit of a uniform Hurst index."""
    return np.asarray(-np.logaddexp(0, -x) - np.logaddexp(0, x))


def find_grid(density: Callable[[Grid], np.ndarray], limits: tuple[float, float] | None) -> Grid:
    """Return a grid that covers what is within exp(-22) of the peak of a density on ``(I, J)``."""
    inner = [(-LOGIT_LIMIT, LOGIT_LIMIT), limits or (0.0, 0.0)]
    box = list(inner)
    counts = (_COARSE[0], _COARSE[1] if limits else 1)
    for _ in range(_ROUNDS):
        grid = _grid(box, counts)
        values = density(grid)
        near = values > values.max() - _DROP
        smaller = []
        for axis, nodes in enumerate((grid.x, grid.a)):
            if len(nodes) == 1:
                smaller.append(box[axis])
                continue
            inside = np.flatnonzero(near.any(axis=1 - axis))
            gap = nodes[1] - nodes[0]
            low, high = inner[axis]
            smaller.append((max(nodes[inside[0]] - gap, low), min(nodes[inside[-1]] + gap, high)))
        shrunk = max((b - a) / (d - c) for (a, b), (c, d) in zip(smaller, box, strict=True) if d > c)
        box = smaller
        if shrunk > 0.7:
            break
    return _grid(box, _FINE_PLANE if limits else _FINE)


def _grid(box: list[tuple[float, float]], counts: tuple[int, int]) -> Grid:
    """Midpoints of equal cells."""
    nodes = []
    for (low, high), count in zip(box, counts, strict=True):
        gap = (high - low) / count
        nodes.append(low + gap * (np.arange(count) + 0.5))
    return Grid(*nodes)


def interpolated_table(
    evaluate: Callable[[np.ndarray], list[Fit]], center: float, width: float, count: int
) -> Table:
    """Return a table of one group from few evaluations around a known peak: polynomials in the logit between Chebyshev nodes."""
    low, high = max(center - width, -LOGIT_LIMIT), min(center + width, LOGIT_LIMIT)
    nodes = chebyshev.chebpts1(count)
    fits = evaluate(expit(low + (high - low) * (nodes + 1) / 2))
    grid = _grid([(low, high), (0.0, 0.0)], (_FINE[0], 1))
    # within the nodes' range the polynomial is a mean of what they say
    place = 2 * (grid.x - low) / (high - low) - 1
    matrix = chebyshev.chebvander(place, count - 1) @ np.linalg.inv(chebyshev.chebvander(nodes, count - 1))

    def at(values: np.ndarray) -> np.ndarray:
        return np.tensordot(matrix, values, 1)

    found = [
        Fit(
            f.free, at(f.log_det), np.exp(at(np.log(f.quadratic))), at(f.coefficients), at(f.root),
            at(f.errors) if f.errors.shape[-1] <= 5000 else f.errors[:, :, :0],
            at(f.log_variance) if f.errors.shape[-1] <= 5000 else f.log_variance[:, :0],
        )
        for f in fits
    ]  # fmt: skip
    return table_on(grid, found, None)


def draw_points(
    grid: Grid, log_density: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``(x, a)`` from a density on cells, ``(S,)`` each: a cell, then a point in it by the density's slope."""
    weight = np.exp(log_density - log_density.max()).ravel()
    cell = rng.choice(len(weight), count, p=weight / weight.sum())
    i, j = np.unravel_index(cell, log_density.shape)
    found = []
    for axis, (nodes, index) in enumerate(((grid.x, i), (grid.a, j))):
        if len(nodes) == 1:
            found.append(nodes[index])
            continue
        slope = np.gradient(np.clip(log_density - log_density.max(), -60, 0), axis=axis)[i, j]
        u = rng.random(count)
        # density exp(slope t) on (-1/2, 1/2), by its inverse
        steep = np.where(np.abs(slope) < 1e-6, 1.0, slope)
        t = np.log1p(u * np.expm1(steep)) / steep - 0.5
        t = np.where(np.abs(slope) < 1e-6, u - 0.5, t)
        found.append(nodes[index] + np.clip(t, -0.5, 0.5) * (nodes[1] - nodes[0]))
    return found[0], found[1]


def interpolate(grid: Grid, values: np.ndarray, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Interpolate ``(I, J, ...)`` linearly at points, ``(S, ...)``."""
    if len(grid.x) == 1:
        return values[0, 0][None].repeat(len(x), 0)
    x = np.clip(x, grid.x[0], grid.x[-1])
    if len(grid.a) == 1:
        return np.asarray(RegularGridInterpolator((grid.x,), values[:, 0])(x[:, None]))
    a = np.clip(a, grid.a[0], grid.a[-1])
    return np.asarray(RegularGridInterpolator((grid.x, grid.a), values)(np.stack([x, a], -1)))


def draw_hierarchy(
    log_likelihoods: np.ndarray, x: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Draw Hurst indices of N series with :math:`\operatorname{logit}H_i\sim N(m,\tau^2)`, exactly but for the grid.

    The indices are integrated out on their grid, the hyper-parameters on one of their own; priors are that of a uniform
    index for m, and a half-normal of width 1 for tau.

    Args:
        log_likelihoods: ``(N, I)`` marginal likelihoods of each series.
        x: ``(I,)`` logits at which these are given, equally spaced.
        count: number S of draws.
        rng: source of randomness.

    Returns:
        Logits of the indices ``(S, N)``, and m and tau, ``(S,)`` each.
    """
    gap = x[1] - x[0]
    m_nodes = np.linspace(-5, 5, 81)
    tau_nodes = np.exp(np.linspace(np.log(0.02), np.log(3.0), 41))
    m, tau = (v.ravel() for v in np.meshgrid(m_nodes, tau_nodes, indexing="ij"))
    scaled = (x[None] - m[:, None]) / tau[:, None]
    # a width below the grid's is still a density on it: normalised on the nodes
    prior = -0.5 * scaled**2
    prior = prior - logsumexp(prior, axis=1, keepdims=True)
    total = sum(logsumexp(prior + row[None], axis=1) for row in log_likelihoods)
    total = total + log_uniform(m) - 0.5 * tau**2 + np.log(tau)
    shape = (len(m_nodes), len(tau_nodes))
    drawn_m, drawn_log_tau = draw_points(
        Grid(m_nodes, np.log(tau_nodes)), np.asarray(total).reshape(shape), count, rng
    )
    drawn_tau = np.exp(drawn_log_tau)
    conditional = -0.5 * ((x[None] - drawn_m[:, None]) / drawn_tau[:, None]) ** 2
    logits = np.empty((count, len(log_likelihoods)))
    for i, row in enumerate(log_likelihoods):
        weight = conditional + row[None]
        cumulative = np.cumsum(np.exp(weight - weight.max(1, keepdims=True)), axis=1)
        place = (cumulative < rng.random(count)[:, None] * cumulative[:, -1:]).sum(1)
        logits[:, i] = x[place] + gap * (rng.random(count) - 0.5)
    return logits, drawn_m, drawn_tau
