"""Clouds and fields of the accuracy benchmarks: the bunny with the reference's field and a smooth one, and the wind."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import expm_multiply
from torch import Tensor

from stochdyn.datasets import wind_on_sphere
from stochdyn.vectorfields import PointCloud, farthest_points


class Task(NamedTuple):
    """A field at all nodes of a cloud, to be predicted from some of them."""

    name: str
    split: str
    cloud: PointCloud
    field: Tensor
    train: Tensor
    test: Tensor


def split(n: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` of n nodes without replacement; the others are held out."""
    order = torch.as_tensor(np.random.RandomState(seed).permutation(n))
    return order[:count], order[count:]


def hop_frames(points: np.ndarray, neighbors: int = 10) -> np.ndarray:
    """Tangent frames in the manner of the reference: principal directions of the 15 nearest nodes in hops, unweighted."""
    plain = PointCloud(
        points, neighbors, 2, weights="connectivity", normalization="none", allow_disconnected=True
    )
    links: list[list[int]] = [[] for _ in range(len(points))]
    for i, j in plain.edges.tolist():
        links[i].append(j)
        links[j].append(i)
    wanted = int(1.5 * neighbors) + 1
    frames = np.empty((len(points), 3, 2))
    for i in range(len(points)):
        seen, queue = {i: None}, deque([i])
        while queue and len(seen) < wanted:
            for j in links[queue.popleft()]:
                if j not in seen and len(seen) < wanted:
                    seen[j] = None
                    queue.append(j)
        near = points[list(seen)]
        frames[i] = np.linalg.svd(near - near.mean(0), full_matrices=False)[2][:2].T
    return frames


def bunny_cloud(path: Path, n: int) -> PointCloud:
    """The reference's graph on n points of the bunny: 10 neighbours, unweighted, unnormalised, the longest coordinate 1."""
    vertices = np.load(path)["V"].astype(np.float64)
    points = vertices[farthest_points(vertices, count=n)]
    points = points / np.abs(points).max()
    return PointCloud(
        points,
        10,
        2,
        weights="connectivity",
        normalization="none",
        frames=hop_frames(points),
        allow_disconnected=True,
    )


def diffused_field(cloud: PointCloud, time: float = 100.0) -> Tensor:
    """The reference's field: random vectors, diffused by the connection Laplacian and made unit vectors."""
    sites = cloud.sites(slice(None))
    rng = np.random.RandomState(1)
    start = sites.to_tangent(torch.as_tensor(rng.uniform(size=(len(cloud), 3)) - 0.5))
    start = torch.nn.functional.normalize(start, dim=-1)
    matrix = cloud.pencil(real=True).matrix
    smooth = torch.as_tensor(expm_multiply(-time * matrix, start.flatten().numpy())).reshape(-1, 2)
    return sites.to_ambient(torch.nn.functional.normalize(smooth, dim=-1))


def shadow_field(cloud: PointCloud) -> Tensor:
    """A smooth field of the surrounding space, projected to the tangent planes, of root mean square 1."""
    x, y, z = cloud.points.T
    ambient = torch.stack([torch.sin(2 * y) + 0.5 * z, torch.cos(2 * z) - x, torch.sin(2 * x + y)], -1)
    sites = cloud.sites(slice(None))
    field = sites.to_ambient(sites.to_tangent(ambient))
    return field / field.square().sum(-1).mean().sqrt()


def wind_tasks(num_points: int, counts: tuple[int, ...], splits: int) -> list[Task]:
    """January and July wind at 2000 nodes, in units of its root mean square."""
    tasks = []
    for count in counts:
        for month in (1, 7):
            points, wind = wind_on_sphere(num_points, month)
            cloud = PointCloud(points, 10, 2)
            wind = wind / wind.square().sum(-1).mean().sqrt()
            for seed in range(splits):
                tasks.append(
                    Task(
                        f"wind, {count} nodes",
                        f"month {month}, seed {seed}",
                        cloud,
                        wind,
                        *split(num_points, count, seed),
                    )
                )
    return tasks


def bunny_tasks(path: Path, smoke: bool, trials: int, only: str = "") -> list[Task]:
    """The cells of the table: sizes, fields and shares of observed nodes."""
    cells = (
        [(308, "diffused", 0.5)]
        if smoke
        else [
            (308, "diffused", 0.5),
            (783, "diffused", 0.5),
            (783, "diffused", 0.1),
            (783, "shadow", 0.5),
            (783, "shadow", 0.1),
            (2176, "diffused", 0.5),
            (2176, "shadow", 0.5),
        ]
    )
    cells = [cell for cell in cells if only in _title(*cell)]
    clouds = {n: bunny_cloud(path, n) for n in sorted({n for n, _, _ in cells})}
    tasks = []
    for n, name, share in cells:
        field = (diffused_field if name == "diffused" else shadow_field)(clouds[n])
        # splits of small clouds differ most, and cost least
        count = 1 if smoke or n > 1000 else 3 * trials if n < 500 else trials
        for seed in range(count):
            tasks.append(
                Task(
                    _title(n, name, share), f"seed {seed}", clouds[n], field, *split(n, int(share * n), seed)
                )
            )
    return tasks


def _title(n: int, name: str, share: float) -> str:
    return f"{name}, n = {n}, {share:.0%}"
