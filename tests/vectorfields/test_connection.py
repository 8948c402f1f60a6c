"""Procrustes maps are parallel transport on spheres; curvature is holonomy; orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.vectorfields import PointCloud
from stochdyn.vectorfields.geometry import connect, holonomy, orient, polar_factor
from tests.vectorfields.shapes import fibonacci_sphere, klein_bottle, random_sphere, sphere_frames


def tangent_basis(points: np.ndarray) -> np.ndarray:
    """Exact tangent frames of a unit sphere in any dimension."""
    full = np.linalg.svd(points[:, None, :])[2]
    return np.ascontiguousarray(full[:, 1:].transpose(0, 2, 1))


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_procrustes_is_parallel_transport_on_spheres(dim: int) -> None:
    """Against P v = v - <y, v> (x + y) / (1 + <x, y>), to rounding."""
    rng = np.random.default_rng(0)
    x = random_sphere(50, dim)
    y = x + 0.5 * rng.normal(size=x.shape) / np.sqrt(dim)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    keep = (x * y).sum(1) > 0.1
    x, y = x[keep], y[keep]
    frames = np.concatenate([tangent_basis(x), tangent_basis(y)])
    n = len(x)
    maps = connect(frames, np.arange(n, 2 * n), np.arange(n))  # from x to y
    v = np.einsum("nda,na->nd", frames[:n], rng.normal(size=(n, dim)))
    carried = np.einsum("nda,nab,neb,ne->nd", frames[n:], maps, frames[:n], v)
    exact = v - (y * v).sum(1, keepdims=True) / (1 + (x * y).sum(1, keepdims=True)) * (x + y)
    assert np.abs(carried - exact).max() < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_polar_factor_is_the_orthogonal_factor(size: int) -> None:
    m = np.random.default_rng(0).normal(size=(200, size, size))
    u, _, vt = np.linalg.svd(m)
    np.testing.assert_allclose(polar_factor(m), u @ vt, atol=1e-12)
    np.testing.assert_allclose(
        polar_factor(m) @ polar_factor(m).transpose(0, 2, 1), np.eye(size)[None].repeat(200, 0), atol=1e-12
    )


def test_polar_factor_of_nothing_is_orthogonal() -> None:
    np.testing.assert_array_equal(polar_factor(np.zeros((2, 2))), np.eye(2))


def test_an_octant_turns_by_a_right_angle() -> None:
    corners = np.eye(3)
    turn = holonomy(sphere_frames(corners), [0, 1, 2])
    frames = sphere_frames(corners)
    np.testing.assert_allclose(turn.T @ turn, np.eye(2), atol=1e-12)
    assert abs(np.trace(turn)) < 1e-12
    # counter-clockwise around the octant, seen from outside
    v = frames[0, :, 0]
    carried = frames[0] @ turn @ frames[0].T @ v
    np.testing.assert_allclose(carried, np.cross(corners[0], v), atol=1e-12)


def test_holonomy_is_the_enclosed_area() -> None:
    """A polygon around the pole of the unit sphere turns vectors by 2 pi minus what its exterior angles leave."""
    angle = 2 * np.pi * np.arange(200) / 200
    height = np.cos(0.6)
    ring = np.stack([np.sin(0.6) * np.cos(angle), np.sin(0.6) * np.sin(angle), np.full(200, height)], 1)
    turn = holonomy(sphere_frames(ring), range(200))
    # the polygon of great arcs is a little smaller than the cap of area 2 pi (1 - cos)
    assert abs(np.arctan2(turn[1, 0], turn[0, 0]) - 2 * np.pi * (1 - height)) < 2e-3


def test_flat_space_has_no_holonomy() -> None:
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(5, 2)))[0]
    points = rng.normal(size=(200, 2)) @ plane.T
    cloud = PointCloud(points, 12, dim=2)
    loop = [*cloud.edges[0].tolist(), 5, 9]
    torch.testing.assert_close(cloud.holonomy(loop), torch.eye(2).double(), rtol=0, atol=1e-10)
    values, _ = cloud.spectrum(4)
    assert (values[:2] < 1e-9).all()
    assert values[2] > 1e-3


def test_transport_along_nodes() -> None:
    points = np.eye(3)[[0, 1]]
    between = points[0] + points[1]
    cloud = PointCloud(
        np.concatenate([points, between[None] / np.sqrt(2), fibonacci_sphere(80)]),
        8,
        dim=2,
        frames=sphere_frames(np.concatenate([points, between[None] / np.sqrt(2), fibonacci_sphere(80)])),
    )
    carried = cloud.transport([0.0, 1.0, 0.0], [0, 2, 1])
    torch.testing.assert_close(carried, torch.tensor([-1.0, 0.0, 0.0]).double(), rtol=0, atol=1e-12)


def test_orientation_is_restored_and_its_absence_found() -> None:
    points = fibonacci_sphere(300)
    frames = sphere_frames(points)
    flip = np.random.default_rng(0).random(300) < 0.5
    frames[flip, :, 1] *= -1
    cloud = PointCloud(points, 10, frames=frames)
    assert cloud.is_orientable
    assert (torch.linalg.det(cloud.connections) > 0).all()
    outward = torch.linalg.cross(cloud.frames[..., 0], cloud.frames[..., 1]) * torch.as_tensor(points)
    assert len(outward.sum(-1).sign().unique()) == 1
    bottle = PointCloud(klein_bottle(20), 10, dim=2)
    tails, heads = bottle.edges.numpy().T
    signs, agree = orient(len(bottle), tails, heads, bottle.connections.numpy())
    assert set(signs) <= {-1.0, 1.0}
    assert not agree
