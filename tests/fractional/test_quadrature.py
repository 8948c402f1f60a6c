"""Posteriors by quadrature: the grid finds narrow ridges, alone and in groups, and sums them to the right moments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logsumexp

from stochdyn.fractional.hurst.quadrature import Grid, draw_points, find_grids, log_uniform

LIMITS = (-12.0, 9.0)


def ridge(x: np.ndarray, a: np.ndarray, centre: tuple[float, float], spread: float, rho: float) -> np.ndarray:
    """Log density of a normal law, unlike what a node on a coarse grid sees of it."""
    u, v = (x - centre[0]) / spread, (a - centre[1]) / (3 * spread)
    return -0.5 * (u**2 + v**2 - 2 * rho * u * v) / (1 - rho**2)


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("rho", [0.0, -0.9, 0.97])
@pytest.mark.parametrize("centre", [(0.3, -2.1), (-3.2, -1.4)])
def test_a_narrow_ridge_is_found_and_summed(spread: float, rho: float, centre: tuple[float, float]) -> None:
    def density(grids: list[Grid]) -> list[np.ndarray]:
        (g,) = grids
        return [ridge(g.x[:, None], g.a[None], centre, spread, rho) - log_uniform(g.x)[:, None]]

    (grid,) = find_grids(density, 1, LIMITS)
    total = density([grid])[0] + log_uniform(grid.x)[:, None]
    weight = np.exp(total - logsumexp(total))
    mean = (weight.sum(1) * grid.x).sum()
    assert abs(mean - centre[0]) < 0.01 * spread
    assert np.sqrt((weight.sum(1) * (grid.x - mean) ** 2).sum()) == pytest.approx(spread, rel=0.01)
    x, a = draw_points(grid, total, 20_000, np.random.default_rng(0))
    assert np.corrcoef(x, a)[0, 1] == pytest.approx(rho, abs=0.02 + 0.03 * (1 - rho**2))
    assert x.std() == pytest.approx(spread, rel=0.04)


def test_groups_with_parameters_of_their_own_multiply_to_the_product_of_their_marginals() -> None:
    """Eight ridges of spread 0.3 and different slopes: the common index has the spread 0.3 / sqrt(8)."""
    centres = [(0.8 + 0.05 * k, -6 + 1.7 * k) for k in range(8)]

    def density(grids: list[Grid]) -> list[np.ndarray]:
        return [
            ridge(g.x[:, None], g.a[None], c, 0.3, 0.9 - 0.2 * k)
            for k, (g, c) in enumerate(zip(grids, centres, strict=True))
        ]

    grids = find_grids(density, 8, LIMITS)
    x = grids[0].x
    total = np.sum([logsumexp(v, axis=1) for v in density(grids)], axis=0) + log_uniform(x)
    weight = np.exp(total - logsumexp(total))
    fine = np.linspace(-1, 3, 4001)
    exact = np.sum([-0.5 * ((fine - c[0]) / 0.3) ** 2 for c in centres], axis=0) + log_uniform(fine)
    exact = np.exp(exact - logsumexp(exact))
    for power in (1, 2):
        assert (weight * x**power).sum() == pytest.approx((exact * fine**power).sum(), rel=1e-3)


def test_mass_at_the_end_of_the_range_is_kept() -> None:
    """A density of the index that rises up to one: half of the mass beyond H = 0.5 ** (1 / 3)."""

    def density(grids: list[Grid]) -> list[np.ndarray]:
        return [2 * np.log(expit(grids[0].x))[:, None]]

    (grid,) = find_grids(density, 1, None)
    total = density([grid])[0] + log_uniform(grid.x)[:, None]
    x, _ = draw_points(grid, total, 40_000, np.random.default_rng(1))
    assert (expit(x) > 0.5 ** (1 / 3)).mean() == pytest.approx(0.5, abs=4 * 0.5 / 200)
