"""Graphs: weights, continuous neighbours, approximate search, thinning."""

from __future__ import annotations

import numpy as np
import pytest

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import PointCloud, farthest_points
from stochdyn.vectorfields.geometry import masses
from tests.vectorfields.shapes import fibonacci_sphere, random_sphere


def test_edges_are_those_of_nearest_neighbours() -> None:
    points = random_sphere(80)
    graph = PointCloud(points, 6, dim=2, weights="connectivity").graph
    gap = np.linalg.norm(points[:, None] - points[None], axis=-1)
    near = np.argsort(gap, 1)[:, 1:7]
    wanted = {tuple(sorted((i, int(j)))) for i in range(80) for j in near[i]}
    assert set(zip(graph.tails.tolist(), graph.heads.tolist(), strict=True)) == wanted
    assert (graph.weights == 1).all()
    np.testing.assert_allclose(graph.lengths, gap[graph.tails, graph.heads])


def test_continuous_neighbours() -> None:
    points = random_sphere(300)
    graph = PointCloud(points, 10, dim=2, graph="cknn").graph
    assert (graph.lengths**2 < graph.radius[graph.tails] * graph.radius[graph.heads]).all()


def test_uneven_points_are_evened_out() -> None:
    """Three times as many points on one half of the sphere: the first group of eigenvalues stays together, near 1."""
    rng = np.random.default_rng(0)
    points = random_sphere(3000)
    points = points[(points[:, 2] > 0) | (rng.random(3000) < 0.35)]
    values = PointCloud(points, 30, dim=2).spectrum(16)[0]
    assert abs(values[:6].mean() - 1) < 0.1
    assert values[:6].std() < 0.08
    assert abs(values[6:].mean() / 5 - 1) < 0.1


@pytest.mark.parametrize("normalization", ["local", "degree", "none"])
def test_every_normalisation_is_calibrated(normalization: str) -> None:
    cloud = PointCloud(fibonacci_sphere(600), 12, dim=2, normalization=normalization)
    assert abs(cloud.spectrum(6)[0].mean() - 1) < 0.02
    mass = masses(cloud.graph, 2, normalization)
    assert mass.sum() == pytest.approx(
        cloud.graph.gather(cloud.graph.weights * cloud.graph.lengths**2).sum() / 4
    )


@pytest.mark.slow
def test_approximate_neighbours_are_nearly_the_nearest() -> None:
    pytest.importorskip("pynndescent")
    points = random_sphere(2000)
    exact = PointCloud(points, 10, dim=2).graph
    quick = PointCloud(points, 10, dim=2, search="approximate").graph
    pairs = [set(zip(g.tails.tolist(), g.heads.tolist(), strict=True)) for g in (exact, quick)]
    assert len(pairs[0] & pairs[1]) > 0.98 * len(pairs[0])


def test_thinning_covers_evenly() -> None:
    points = random_sphere(500)
    chosen = farthest_points(points, num_points=60)
    assert chosen[0] == 0
    assert len(set(chosen.tolist())) == 60
    gap = np.linalg.norm(points[:, None] - points[chosen][None], axis=-1)
    among = np.linalg.norm(points[chosen][:, None] - points[chosen][None], axis=-1)
    # no point is farther from the chosen ones than these are from one another
    assert gap.min(1).max() <= among[among > 0].min() + 1e-12
    by_spacing = farthest_points(points, spacing=0.1)
    gap = np.linalg.norm(points[:, None] - points[by_spacing][None], axis=-1).min(1)
    assert gap.max() <= 0.1 * np.linalg.norm(np.ptp(points, axis=0))
    with pytest.raises(InvalidInputError, match="either num_points or spacing"):
        farthest_points(points)
