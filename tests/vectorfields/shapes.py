"""Manifolds with known geometry, and points on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stochdyn.vectorfields import RVGP


def fibonacci_sphere(n: int) -> np.ndarray:
    """Evenly spread points on the unit sphere."""
    i = np.arange(n) + 0.5
    z, turn = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(turn), r * np.sin(turn), z], 1)


def random_sphere(n: int, dim: int = 2, seed: int = 0) -> np.ndarray:
    """Independent uniform points on a unit sphere of any dimension."""
    x = np.random.default_rng(seed).normal(size=(n, dim + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sphere_frames(points: np.ndarray) -> np.ndarray:
    """Exact tangent frames (n, 3, 2) of the unit sphere."""
    axis = np.eye(3)[np.abs(points).argmin(1)]
    first = np.cross(axis, points)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(points, first)], -1)


def clifford_torus(n: int) -> np.ndarray:
    """A regular triangular-like lattice of n by n points on the product of two unit circles, in four dimensions."""
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    s = 2 * np.pi * (i + 0.5 * (j % 2)).ravel() / n
    t = 2 * np.pi * j.ravel() / n
    return np.stack([np.cos(s), np.sin(s), np.cos(t), np.sin(t)], 1)


def klein_bottle(n: int) -> np.ndarray:
    """A flat Klein bottle in five dimensions, n by n points.

    The quotient of the plane by (u, v) -> (u + pi, -v) and v -> v + 2 pi, embedded by functions that it leaves alone.
    Lengths in u are those of u times sqrt(1 + ...): the map is an isometry only up to the second form, so it is used for
    topology, not for eigenvalues.
    """
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    u = np.pi * (i + 0.5 * (j % 2)).ravel() / n
    v = 2 * np.pi * j.ravel() / n
    return np.stack(
        [np.cos(2 * u), np.sin(2 * u), np.cos(v), np.cos(u) * np.sin(v), np.sin(u) * np.sin(v)], 1
    )


def torus(n: int, major: float = 2.0, minor: float = 0.7, seed: int = 0) -> np.ndarray:
    """Uniform random points on a torus of revolution."""
    rng = np.random.default_rng(seed)
    out = np.empty((0, 3))
    while len(out) < n:
        a, b = rng.random((2, 2 * n)) * 2 * np.pi
        keep = rng.random(2 * n) < (major + minor * np.cos(b)) / (major + minor)
        r = major + minor * np.cos(b)
        out = np.concatenate([out, np.stack([r * np.cos(a), r * np.sin(a), minor * np.sin(b)], 1)[keep]])
    return out[:n]


def icosphere(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces of an icosahedron, divided and blown up to the unit sphere."""
    g = (1 + 5**0.5) / 2
    signs = [(a, b) for a in (-1, 1) for b in (-g, g)]
    vertices = [v for a, b in signs for v in ((0, a, b), (a, b, 0), (b, 0, a))]
    points = np.array(vertices, dtype=float) / np.hypot(1, g)
    gap = np.linalg.norm(points[:, None] - points[None], axis=-1)
    near = (gap > 0) & (gap < 1.2)
    faces = np.array(
        [
            (i, j, k)
            for i in range(12)
            for j in range(i)
            for k in range(j)
            if near[i, j] and near[j, k] and near[i, k]
        ]
    )
    for _ in range(levels):
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        unique, inverse = np.unique(edges, axis=0, return_inverse=True)
        middle = points[unique].mean(1)
        at = len(points) + inverse.reshape(3, -1).T
        points = np.concatenate([points, middle / np.linalg.norm(middle, axis=1, keepdims=True)])
        (a, b, c), (ab, bc, ca) = faces.T, at.T
        faces = np.concatenate(
            [np.stack(t, 1) for t in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))]
        )
    inward = (
        np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])
        * points[faces[:, 0]]
    ).sum(1) < 0
    faces[inward] = faces[inward][:, ::-1]
    return points, faces


def as_far_as_draws(gp: RVGP, truth: torch.Tensor, where: Any = slice(None), draws: int = 100) -> float:
    """How far the truth lies from the posterior mean, in standard deviations of the distances of the posterior's draws.

    Near zero for a calibrated model; large for a fit that is worse than it believes, small for bands that are too wide.
    """
    mean = gp.predict_mean(where)
    drawn = gp.sample(draws, where, torch.Generator().manual_seed(0)) - mean
    law = drawn.flatten(1).norm(dim=1)
    return float(((mean - truth).norm() - law.mean()) / law.std())
