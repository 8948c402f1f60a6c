"""From blocks to draws of everything: what :func:`infer_hurst` and :func:`infer_roughness` share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit, logsumexp

from stochdyn.fractional.hurst.check import Checks, check_errors, short_memory_test
from stochdyn.fractional.hurst.data import Block
from stochdyn.fractional.hurst.laws import Law
from stochdyn.fractional.hurst.marginal import Fit, fits_of, whittle_fit, without_gaps
from stochdyn.fractional.hurst.quadrature import (
    Grid,
    Table,
    draw_hierarchy,
    draw_points,
    find_grids,
    interpolate,
    interpolated_table,
    log_uniform,
    table_on,
)
from stochdyn.run.progress import progress_bar

__all__ = ["WHITTLE_FROM", "Draws", "Problem", "solve"]

WHITTLE_FROM = 30_000  # values of a series from which the Whittle likelihood takes over
_LONG = 1500  # values from which few nodes around the peak serve
_NODES = 11
_WIDTH = 6.5  # half width of the range of these nodes, in standard deviations
_MOST_NODES = 400  # of a hierarchy


@dataclass
class Problem:
    """Blocks with their law.

    Attributes:
        groups: The blocks that share a scale and a further parameter.
        differences: Whether the blocks are differences of positions.
        known: For each group the standard deviation of errors of
            observation in the units of its blocks, or None.
        hierarchy: Whether each series has a Hurst index of its own, from a common normal law of logits.
    """

    groups: list[list[Block]]
    law: Law
    differences: bool
    known: list[float | None]
    hierarchy: bool
    progress: bool
    name: str


@dataclass
class Draws:
    """Draws, by group: Hurst index, scale of the whole and further parameter; by group and block the coefficients.

    Attributes:
        hurst: The Hurst indices ``(S, G)``.
        total: The standard deviations ``(S, G)`` of a value over one step.
        other: The further parameters ``(S, G)``.
        coefficients: The coefficients ``(S, p)`` of each group and block.
        checks: The tests of the prediction errors.
        peak: The Hurst index of the largest marginal
            density. log_likelihood: per group and block ``(S, n)`` or None. population: mean and width of logits, ``(S,)`` each, or None.
    """

    hurst: np.ndarray
    total: np.ndarray
    other: np.ndarray
    coefficients: list[list[np.ndarray]]
    checks: Checks
    peak: float
    log_likelihood: list[list[np.ndarray | None]]
    population: tuple[np.ndarray, np.ndarray] | None


def solve(problem: Problem, count: int, rng: np.random.Generator) -> Draws:
    """Find the mass of the posterior, tabulate it, and draw from it."""
    tables = _tables(problem)
    law = problem.law
    priors = [law.log_prior(t.grid.a, eta) for t, eta in zip(tables, problem.known, strict=True)]
    profiles = [logsumexp(t.log_marginal + prior, axis=1) for t, prior in zip(tables, priors, strict=True)]
    x_grid = tables[0].grid.x
    population = None
    total_profile = np.sum(profiles, axis=0) + log_uniform(x_grid)
    peak = float(expit(x_grid[int(total_profile.argmax())]))
    if problem.hierarchy:
        # blocks of one series share its index: their marginals multiply
        series = sorted({g[0].series for g in problem.groups})
        rows = np.stack([
            np.sum([p for p, g in zip(profiles, problem.groups, strict=True) if g[0].series == s], axis=0)
            for s in series
        ])  # fmt: skip
        logits, m, tau = draw_hierarchy(rows, x_grid, count, rng)
        x = np.stack([logits[:, series.index(g[0].series)] for g in problem.groups], axis=1)
        population = (m, tau)
    elif len(tables) == 1:
        joint = tables[0].log_marginal + priors[0] + log_uniform(x_grid)[:, None]
        one, a_one = draw_points(tables[0].grid, joint, count, rng)
        x = one[:, None]
    else:
        one, _ = draw_points(Grid(x_grid, np.zeros(1)), total_profile[:, None], count, rng)
        x = np.repeat(one[:, None], len(tables), axis=1)
    other, total, coefficients, densities = [], [], [], []
    for g, table in enumerate(tables):
        a = (
            a_one
            if len(tables) == 1 and not problem.hierarchy
            else _draw_other(table, priors[g], x[:, g], rng)
        )
        eta = problem.known[g]
        other.append(law.value(a, eta))
        shape = (len(table.grid.x), len(table.grid.a))
        if eta is None:
            q = np.exp(interpolate(table.grid, np.log(table.quadratic), x[:, g], a))
            scale = np.sqrt(q / rng.chisquare(table.free, count))
        else:
            scale = eta * np.sqrt(2 / other[g])
        total.append(scale)
        rows_c, rows_d = [], []
        for block, fit in zip(problem.groups[g], table.fits, strict=True):
            center = interpolate(table.grid, fit.coefficients.reshape(*shape, -1), x[:, g], a)
            p = center.shape[1]
            root = interpolate(table.grid, fit.root.reshape(*shape, p, p), x[:, g], a)
            normal = rng.standard_normal((count, p))
            beta = center + scale[:, None] * np.einsum("spq,sq->sp", root, normal)
            rows_c.append(beta)
            rows_d.append(_pointwise(table.grid, block, fit, x[:, g], a, scale, beta))
        coefficients.append(rows_c)
        densities.append(rows_d)
    checks = check_errors(_residuals(problem, tables, priors, profiles, peak))
    checks = checks._replace(memory=min(checks.memory, short_memory_test(problem.groups, law)))
    return Draws(
        expit(x), np.stack(total, 1), np.stack(other, 1), coefficients, checks, peak, densities, population
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- tables


def _tables(problem: Problem) -> list[Table]:
    law, blocks = problem.law, [b for g in problem.groups for b in g]
    limits = law.limits(any(k is not None for k in problem.known))
    longest = max(len(b.values) for b in blocks)
    if longest > _LONG and len(blocks) == 1 and limits is None and blocks[0].complete:
        return [_long_table(problem, blocks[0])]

    def tabulate(groups: list[int], grids: list[Grid]) -> list[Table]:
        found = []
        if limits is None:  # all groups have one law on one set of nodes
            hurst, a = grids[0].points
            every = [b for g in groups for b in problem.groups[g]]
            together = iter(fits_of(every, law, hurst, law.value(a, None), problem.differences))
        for g, grid in zip(groups, grids, strict=True):
            if limits is None:
                found.append(table_on(grid, [next(together) for _ in problem.groups[g]], None))
                continue
            hurst, a = grid.points
            eta = problem.known[g]
            value = law.value(a, eta)
            fits = fits_of(problem.groups[g], law, hurst, value, problem.differences)
            found.append(table_on(grid, fits, None if eta is None else eta * np.sqrt(2 / value)))
        return found

    rounds = progress_bar(None, problem.name, problem.progress, unit="grid")

    def find(groups: list[int]) -> list[Grid]:
        def density(grids: list[Grid]) -> list[np.ndarray]:
            rounds.update()
            return [
                np.asarray(table.log_marginal + law.log_prior(table.grid.a, problem.known[g]))
                for g, table in zip(groups, tabulate(groups, grids), strict=True)
            ]

        return find_grids(density, len(groups), limits)

    everyone = list(range(len(problem.groups)))
    try:
        if not problem.hierarchy:
            return tabulate(everyone, find(everyone))
        alone = [find([g])[0] for g in everyone]
        # One set of nodes for all indices: over the mass of each, and as fine as the sharpest of them needs.
        low, high = min(g.x[0] for g in alone), max(g.x[-1] for g in alone)
        gap = min(g.x[1] - g.x[0] for g in alone)
        nodes = np.linspace(low, high, min(_MOST_NODES, 1 + math.ceil((high - low) / gap)))
        return tabulate(everyone, [Grid(nodes, g.a) for g in alone])
    finally:
        rounds.close()


def _long_table(problem: Problem, block: Block) -> Table:
    """One long series: the peak and its width by the Whittle likelihood, then few exact evaluations around it."""
    law, n = problem.law, len(block.values)
    # regressors are subtracted already, which is good enough to find the peak
    plain = Block(block.values, block.times, np.full((n, 1), n**-0.5), 0, 0, 0, block.length)

    def whittle(grids: list[Grid]) -> list[np.ndarray]:
        hurst, _ = grids[0].points
        return [table_on(grids[0], [whittle_fit(plain, law, hurst)], None).log_marginal]

    (grid,) = find_grids(whittle, 1, None)
    weight = whittle([grid])[0][:, 0] + log_uniform(grid.x)
    weight = np.exp(weight - weight.max())
    weight = weight / weight.sum()
    center = float((weight * grid.x).sum())
    width = math.sqrt(float((weight * (grid.x - center) ** 2).sum()))
    bar = progress_bar(_NODES, problem.name, problem.progress, unit="node")

    def evaluate(hurst: np.ndarray) -> list[Fit]:
        if n > WHITTLE_FROM:
            return [whittle_fit(block, law, hurst)]
        parts = []
        for h in hurst:
            parts += fits_of([block], law, np.array([h]), np.zeros(1), problem.differences)
            bar.update()
        joined = {
            name: np.concatenate([getattr(p, name) for p in parts])
            for name in ("log_det", "quadratic", "coefficients", "root", "errors", "log_variance")
        }
        return [Fit(parts[0].free, **joined)]

    with bar:
        return interpolated_table(evaluate, center, max(_WIDTH * width, 1e-4), _NODES)


# ----------------------------------------------------------------------------------------------- draws


def _draw_other(table: Table, prior: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the further parameter of one group given the logits of the Hurst index."""
    grid = table.grid
    if len(grid.a) == 1:
        return np.zeros(len(x))
    weight = interpolate(Grid(grid.x, np.zeros(1)), (table.log_marginal + prior)[:, None, :], x, x)
    cumulative = np.cumsum(np.exp(weight - weight.max(1, keepdims=True)), axis=1)
    place = (cumulative < rng.random(len(x))[:, None] * cumulative[:, -1:]).sum(1)
    gap = grid.a[1] - grid.a[0]
    return np.asarray(grid.a[place] + gap * (rng.random(len(x)) - 0.5))


def _pointwise(
    grid: Grid, block: Block, fit: Fit, x: np.ndarray, a: np.ndarray, scale: np.ndarray, beta: np.ndarray
) -> np.ndarray | None:
    """Log density of each observed value given those before it, ``(S, n)``, by the prediction errors of the nodes."""
    n = fit.errors.shape[-1]
    if n == 0 or n * len(x) > 2e7:
        return None
    if block.gaps:
        errors, log_variance = without_gaps(block, fit)
        fit = replace(fit, errors=errors, log_variance=log_variance)
        beta = beta[:, : errors.shape[1] - 1]
    w = _cubic_weights(grid, x, a)
    rest = w @ fit.errors[:, 0]
    for p in range(beta.shape[1]):
        rest -= beta[:, p, None] * (w @ fit.errors[:, 1 + p])
    log_variance = w @ fit.log_variance + 2 * np.log(scale)[:, None]
    return np.asarray(-0.5 * (math.log(2 * math.pi) + log_variance + (rest / scale[:, None]) ** 2))


def _cubic_weights(grid: Grid, x: np.ndarray, a: np.ndarray) -> csr_array:
    """Return weights ``(S, I J)`` that interpolate values at the nodes at points ``(S,)``: cubics through the nearest four on each axis.

    A chord would not do: the curvatures of log determinant and quadratic form, which nearly cancel, are of the order of n.
    """
    (i, u), (j, v) = _along(grid.x, x), _along(grid.a, a)
    column = (i[:, :, None] * len(grid.a) + j[:, None, :]).reshape(len(x), -1)
    weight = (u[:, :, None] * v[:, None, :]).reshape(len(x), -1)
    ends = np.arange(len(x) + 1) * column.shape[1]
    return csr_array((weight.ravel(), column.ravel(), ends), shape=(len(x), len(grid.x) * len(grid.a)))


def _along(nodes: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places and weights ``(S, 4)`` of the nodes that a cubic at ``x (S,)`` goes through."""
    if len(nodes) == 1:
        return np.zeros((len(x), 1), dtype=int), np.ones((len(x), 1))
    place = np.clip((x - nodes[0]) / (nodes[1] - nodes[0]), 0, len(nodes) - 1)
    order = min(4, len(nodes))
    first = np.clip(place.astype(int) - 1, 0, len(nodes) - order)
    # Lagrange: prod_m (t - m) / (k - m)
    weights = [
        np.prod([(place - first - m) / (k - m) for m in range(order) if m != k], axis=0) for k in range(order)
    ]
    return first[:, None] + np.arange(order), np.stack(weights, 1)


def _residuals(
    problem: Problem, tables: list[Table], priors: list[np.ndarray], profiles: list[np.ndarray], peak: float
) -> list[np.ndarray]:
    """Standardised prediction errors of each block at the most probable parameters."""
    found = []
    for table, prior, profile in zip(tables, priors, profiles, strict=True):
        own = profile + log_uniform(table.grid.x)
        i = int(own.argmax()) if problem.hierarchy else int(np.abs(expit(table.grid.x) - peak).argmin())
        j = int((table.log_marginal[i] + prior).argmax())
        node = i * len(table.grid.a) + j
        s = math.sqrt(float(table.quadratic[i, j]) / table.free)
        for fit in table.fits:
            if fit.errors.shape[-1]:
                y, z = fit.errors[node, 0], fit.errors[node, 1:]
                found.append((y - fit.coefficients[node] @ z) / s)
    return found
