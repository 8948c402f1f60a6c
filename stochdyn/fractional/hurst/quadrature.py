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
    "find_grids",
    "interpolate",
    "interpolated_table",
    "log_uniform",
    "table_on",
]

LOGIT_LIMIT = float(logit(HURST_LIMITS[1]))
_DROP = 14.0  # log density below its peak at which the grid ends
_COARSE, _FINE, _FINE_PLANE = (21, 15), (61, 1), (41, 21)
_ROUNDS, _REFINEMENTS, _MOST = 8, 4, 164
_STEP = 4.0  # nats between neighbours at the peak that still show where the mass is
_AGREE = 0.05  # nats by which sums over every other node may differ; those over all nodes are then far closer


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
        log_marginal: The logarithms ``(I, J)`` of the marginal likelihood.
        quadratic: The quadratic forms ``(I, J)``.
        free: The degrees of freedom.
        fits: The fit of each block, with arrays ``(I J, ...)``.
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


def find_grids(
    density: Callable[[list[Grid]], list[np.ndarray]], count: int, limits: tuple[float, float] | None
) -> list[Grid]:
    """Return grids, one per group, that hold all but about exp(-14) of a posterior and are fine enough to sum it.

    The groups share the Hurst index, whose nodes are common, and each has a further parameter of its own. The box of nodes shrinks around
    the mass. What decides is an upper bound of the density around each node, since a ridge may run between nodes. Then nodes are added until
    every other one gives the same marginal density, so that all of them give it to far less than a hundredth of a nat.

    Args:
        density: A function from one grid per group to the log densities ``(I, J)`` of each group's data and further parameter
            given the Hurst index.
        count: The number of groups.
        limits: The range of the further parameter; None where there is none.
    """
    inner = (-LOGIT_LIMIT, LOGIT_LIMIT)
    box, boxes = inner, [limits or (0.0, 0.0)] * count
    nodes, others = _COARSE[0], [_COARSE[1] if limits else 1] * count
    for _ in range(_ROUNDS):
        grids = [_grid([box, own], (nodes, m)) for own, m in zip(boxes, others, strict=True)]
        values = density(grids)
        smaller, boxes_smaller = _shrunk(grids, values, inner, limits)
        shares = [(smaller[1] - smaller[0]) / (box[1] - box[0])]
        if limits:
            shares += [(d - c) / (b - a) for (c, d), (a, b) in zip(boxes_smaller, boxes, strict=True)]
        box, boxes = smaller, boxes_smaller
        if min(shares) < 0.8:
            continue
        if max(float(_half_steps(v).ravel()[v.argmax()]) for v in values) < _STEP:
            break
        # The nodes stand too far apart to tell where the mass is.
        nodes, others = 2 * nodes, [2 * m for m in others] if limits else others
    nodes, others = (_FINE_PLANE[0] if limits else _FINE[0]), [_FINE_PLANE[1] if limits else 1] * count
    for _ in range(_REFINEMENTS):
        grids = [_grid([box, own], (nodes, m)) for own, m in zip(boxes, others, strict=True)]
        values = density(grids)
        rough_x, rough = _unresolved(grids[0].x, values)
        if not rough_x and not any(rough):
            break
        nodes = min(2 * nodes, _MOST) if rough_x else nodes
        others = [min(2 * m, _MOST) if r else m for m, r in zip(others, rough, strict=True)]
    return grids


def _shrunk(
    grids: list[Grid],
    values: list[np.ndarray],
    inner: tuple[float, float],
    limits: tuple[float, float] | None,
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """Return the box that can hold mass, of the Hurst index and of each group's further parameter."""
    x = grids[0].x
    bounds = [v + _half_steps(v) for v in values]
    # Of the whole posterior at each index: at least the largest value at a node, at most the largest bound.
    least = np.sum([v.max(1) for v in values], axis=0) + log_uniform(x)
    most = [b.max(1) for b in bounds]
    floor = least.max() - _DROP
    total = np.sum(most, axis=0) + log_uniform(x)
    box = _around(x, total > floor, inner)
    own = []
    for grid, bound, top in zip(grids, bounds, most, strict=True):
        if limits is None:
            own.append((0.0, 0.0))
            continue
        rest = total - top
        own.append(_around(grid.a, (bound + rest[:, None] > floor).any(0), limits))
    return box, own


def _half_steps(values: np.ndarray) -> np.ndarray:
    """How far a log density may rise between a node and its neighbours: half the largest difference to them."""
    found = np.zeros_like(values)
    for axis in (0, 1):
        if values.shape[axis] == 1:
            continue
        step = 0.5 * np.abs(np.diff(values, axis=axis))
        ends = [(0, 0), (0, 0)]
        for side in ((0, 1), (1, 0)):
            ends[axis] = side
            found = np.maximum(found, np.pad(step, ends))
    return found


def _around(nodes: np.ndarray, near: np.ndarray, limits: tuple[float, float]) -> tuple[float, float]:
    inside = np.flatnonzero(near)
    gap = nodes[1] - nodes[0]
    return max(nodes[inside[0]] - gap, limits[0]), min(nodes[inside[-1]] + gap, limits[1])


def _unresolved(x: np.ndarray, values: list[np.ndarray]) -> tuple[bool, list[bool]]:
    """Whether every other node would give another answer: in the Hurst index, and in each further parameter."""
    profiles = [logsumexp(v, axis=1) for v in values]
    total = np.sum(profiles, axis=0) + log_uniform(x)
    weight = np.exp(total - logsumexp(total))
    rough = []
    for v, profile in zip(values, profiles, strict=True):
        # The mean over the posterior of what half of the nodes lose; what all of them lose falls faster than any power of that.
        halves = [v[:, k::2] for k in range(min(2, v.shape[1]))]
        lost = [np.abs(logsumexp(h, axis=1) + np.log(v.shape[1] / h.shape[1]) - profile) for h in halves]
        rough.append(bool(max(weight @ np.minimum(gap, 1.0) for gap in lost) > _AGREE))
    halves_x = [logsumexp(total[k::2]) + np.log(len(x) / len(total[k::2])) for k in (0, 1)]
    return bool(max(abs(h - logsumexp(total)) for h in halves_x) > _AGREE), rough


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
        log_likelihoods: The log marginal likelihoods ``(N, I)`` of each series.
        x: The logits ``(I,)`` at which these are given, equally spaced.
        count: The number S of draws.
        rng: The source of randomness.

    Returns:
        Logits of the indices ``(S, N)``, and m and tau, ``(S,)`` each.
    """
    # p(m, tau | y) is the product over series of the sum over nodes of N(x; m, tau^2) L_i(x); then each index given m and tau.
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
