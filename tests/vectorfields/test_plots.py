"""Plots show what they are given."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields import (
    RVGP,
    PointCloud,
    find_singularities,
    plot_field,
    plot_globe,
    plot_trajectories,
)
from tests.vectorfields.shapes import fibonacci_sphere, torus


def test_arrows_in_the_plane_and_in_space() -> None:
    flat = plot_field(torch.rand(20, 2), torch.ones(20, 2), every=2, scale=0.1)
    arrows = flat.collections[-1]
    assert arrows.N == 10
    np.testing.assert_allclose(arrows.U, 0.1)
    space = plot_field(torus(50), np.ones((50, 3)), values=torch.arange(50.0))
    np.testing.assert_allclose(space.collections[0].get_array(), np.arange(50.0))
    with pytest.raises(InvalidInputError, match="4 coordinates"):
        plot_field(torch.rand(5, 4), torch.rand(5, 4))


def test_globe_shows_east_and_north() -> None:
    points = torch.as_tensor(fibonacci_sphere(60))
    east = torch.linalg.cross(torch.tensor([[0.0, 0.0, 1.0]]).double().expand(60, 3), points)
    ax = plot_globe(points, east)
    arrows = ax.collections[-1]
    np.testing.assert_allclose(arrows.V, 0.0, atol=1e-12)
    np.testing.assert_allclose(arrows.U, (1 - points[:, 2] ** 2).sqrt())
    assert ax.get_ylim() == (-90, 90)
    with pytest.raises(InvalidInputError, match="on a sphere"):
        plot_globe(torus(30), np.ones((30, 3)))


def test_trajectories() -> None:
    ax = plot_trajectories(torch.randn(4, 5, 7, 3), num_paths=6)
    assert len(ax.lines) == 6
    assert len(plot_trajectories(torch.randn(7, 2)).lines) == 1


def test_zeros_are_marked() -> None:
    cloud = PointCloud(fibonacci_sphere(200), 10, dim=2)
    spin = torch.linalg.cross(torch.tensor([[0.0, 0.3, 1.0]]).double().expand(200, 3), cloud.points)
    gp = RVGP(cloud, num_eigenpairs=30).fit(range(200), spin)
    zeros = find_singularities(gp, num_draws=4, generator=torch.Generator().manual_seed(0))
    ax = plot_globe(cloud.points, spin, zeros=zeros)
    drawn, mean = ax.collections[-2:]
    assert len(drawn.get_offsets()) == 8
    # the axis is tilted to longitude 90; its other end lies to the south at -90
    expected = [[90.0, np.degrees(np.arctan2(1, 0.3))], [-90.0, -np.degrees(np.arctan2(1, 0.3))]]
    got = mean.get_offsets()[np.argsort(-mean.get_offsets()[:, 1])]
    np.testing.assert_allclose(got, expected, atol=8.0)
    assert (mean.get_edgecolor()[:, 0] == 1).all()
    space = plot_field(cloud.points, spin, zeros=zeros)
    assert len(space.collections) == 3
