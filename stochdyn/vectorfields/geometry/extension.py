"""How new points are tied to the nodes of a cloud: neighbours, weights, frames and connections."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stochdyn.errors import ApproximationWarning
from stochdyn.vectorfields.geometry.connection import polar_factor
from stochdyn.vectorfields.geometry.frames import local_frames

if TYPE_CHECKING:
    from stochdyn.vectorfields.geometry.cloud import PointCloud

__all__ = ["Ties", "tie"]

#: Farther than this many local radii from any node, a place isn't on the manifold that the cloud shows.
_FAR = 3.0


@dataclass(frozen=True)
class Ties:
    """Arrays of :class:`~stochdyn.vectorfields.regression.sites.Sites`, for new points."""

    nodes: np.ndarray
    frames: np.ndarray
    weights: np.ndarray
    maps: np.ndarray
    degree: np.ndarray
    mass: np.ndarray


def tie(cloud: PointCloud, points: np.ndarray) -> Ties:
    """Tie points ``(q, D)`` to a cloud by the rules that tie its nodes to one another.

    Warns:
        ApproximationWarning: if points lie far from all nodes.
    """
    graph, count = cloud.graph, min(cloud.num_neighbors, len(cloud))
    distances, nodes = cloud.search.query(points, min(max(count, cloud.frame_neighbors), len(cloud)))
    distance = distances[:, 0] / graph.radius[nodes[:, 0]]
    if (distance > _FAR).any():
        warnings.warn(
            f"{int((distance > _FAR).sum())} of {len(points)} points lie off the cloud: their nearest node is up to "
            f"{distance.max():.1f} neighbourhoods away.",
            ApproximationWarning,
            stacklevel=5,
        )
    turned = local_frames(cloud.array, points, distances, nodes, cloud.dim)
    distances, nodes = distances[:, :count], nodes[:, :count]
    weights = graph.extension(distances, nodes)
    mass, degree = np.zeros(len(points)), weights.sum(1)
    if cloud.faces is None:
        if cloud.normalization == "local":
            mass = (weights * distances**2).sum(1) / (2.0 * cloud.dim)
        else:
            mass = degree * (cloud.mass.sum() / graph.degree.sum())
    node_frames = cloud.node_frames
    on_node = distance <= 1e-9
    turned[on_node] = node_frames[nodes[on_node, 0]]
    weights[on_node] = np.eye(1, count)
    degree[on_node], mass[on_node] = 1.0, 0.0
    maps = polar_factor(np.einsum("qda,qjdb->qjab", turned, node_frames[nodes]))
    if cloud.is_orientable:
        # a new frame has no handedness of its own, and takes that of its nearest node
        flip = np.linalg.det(maps[:, 0]) < 0
        turned[flip, :, -1] *= -1.0
        maps[flip, :, -1, :] *= -1.0
    return Ties(nodes, turned, weights, maps, degree, mass)
