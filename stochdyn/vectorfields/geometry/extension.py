"""The reader of fields off the nodes: how a new point is tied to the nodes around it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stochdyn.errors import ApproximationWarning
from stochdyn.vectorfields.geometry.connection import polar_factor

if TYPE_CHECKING:
    from stochdyn.vectorfields.geometry.cloud import PointCloud

__all__ = ["FAR", "Ties", "left_out", "tie", "typical_doubt"]

#: Farther than this many local radii from any node, the cloud says nothing of the manifold.
FAR = 1.0
#: Correlation length of the reader, in local radii, and what keeps its small systems solvable.
_REACH, _NUGGET = 3.0, 1e-9
#: The most nodes that are read from the others, at every level, to see how rough the fields of a prior are.
_LEFT_OUT = 150
#: What part of its nearest neighbours a node that is left out is read without, from level to level.
_SKIPPED = (0.0, 0.25, 0.5)
#: Points whose small systems are solved at once.
_BLOCK = 20_000


@dataclass(frozen=True)
class Ties:
    """Arrays of :class:`~stochdyn.vectorfields.regression.sites.Sites`, for new points."""

    nodes: np.ndarray
    frames: np.ndarray
    weights: np.ndarray
    maps: np.ndarray
    open: np.ndarray
    doubt: np.ndarray


def tie(cloud: PointCloud, points: np.ndarray) -> Ties:
    r"""Tie points ``(q, D)`` to a cloud: neighbours, frames, connections, and the weights by which fields are read.

    The value at a new point is the best linear prediction from its neighbours for a field whose components, carried by
    the connection, have a Matérn correlation k of smoothness 3/2 and a length of three times the radius of the neighbourhood:

    .. math:: u(x)=\sum_jc_jO_{xj}u_j,\qquad c=\arg\min_{|c|\le1}\ 1-2c^\top k(x)+c^\top Kc,

    which is :math:`K^{-1}k(x)` unless that would extrapolate: what of a field is noise of the nodes, without any correlation, is read
    with the variance :math:`|c|^2` of a node's, and shall not be enlarged. So smooth fields are read to high order between the nodes, the
    reading is exact and continuous at the nodes, and it falls to zero away from all of them, in holes and past borders. What the weights
    leave out is made up for by :meth:`~stochdyn.vectorfields.regression.engines.Engine.missing_variance`.

    Warns:
        ApproximationWarning: If points lie farther from all nodes than these from one another.
    """
    count = min(max(cloud.num_neighbors, cloud.frame_neighbors), len(cloud))
    distances, nodes = cloud.search.query(points, count)
    radius = cloud.graph.radius[nodes[:, 0]]
    distance = distances[:, 0] / radius
    if (distance > FAR).any():
        warnings.warn(
            f"{int((distance > FAR).sum())} of {len(points)} points lie off the cloud: their nearest node is up to "
            f"{distance.max():.1f} neighbourhoods away, and the field falls back to its prior there.",
            ApproximationWarning,
            stacklevel=5,
        )
    if cloud.faces is not None:
        distances, nodes = _along_the_mesh(cloud, points, nodes[:, 0], count)
    weights, doubt = _weights(cloud.array, distances, nodes, radius)
    on_node = distance <= 1e-12
    weights[on_node], doubt[on_node] = np.eye(1, nodes.shape[1]), 0.0
    frames = _frames(cloud.node_frames[nodes], weights)
    return _ties(cloud, nodes, frames, weights, doubt)


def _ties(
    cloud: PointCloud, nodes: np.ndarray, frames: np.ndarray, weights: np.ndarray, doubt: np.ndarray
) -> Ties:
    maps = polar_factor(np.einsum("qda,qjdb->qjab", frames, cloud.node_frames[nodes]))
    beyond = np.maximum(doubt - cloud.typical_doubt, 0.0) / (1.0 - cloud.typical_doubt)
    return Ties(nodes, frames, weights, maps, beyond, doubt)


def left_out(cloud: PointCloud) -> tuple[np.ndarray, list[Ties]]:
    """Return some nodes, spread over the cloud, and how each of them is read from others, in its own frame.

    First from all others, then without the nearest ones, from farther and farther away: what a prior's fields differ there from what
    is read is their variogram, which tells how rough they are and what of them is noise of the nodes.
    """
    chosen = np.unique(np.linspace(0, len(cloud) - 1, min(len(cloud), _LEFT_OUT)).astype(int))
    usual = max(cloud.num_neighbors, cloud.frame_neighbors)
    count = min(1 + usual + int(_SKIPPED[-1] * usual), len(cloud))
    distances, nodes = cloud.search.query(cloud.array[chosen], count)
    if cloud.faces is not None:
        distances, nodes = _along_the_mesh(cloud, cloud.array[chosen], nodes[:, 0], count)
    levels = []
    for share in _SKIPPED:
        first = 1 + int(share * usual)
        part = slice(first, first + usual)
        if first >= distances.shape[1]:
            break
        weights, doubt = _weights(cloud.array, distances[:, part], nodes[:, part], cloud.graph.radius[chosen])
        levels.append(_ties(cloud, nodes[:, part], cloud.node_frames[chosen], weights, doubt))
    return chosen, levels


def typical_doubt(cloud: PointCloud) -> float:
    """Return what the reader leaves open at nodes that are read from their neighbours, at most, but for one in a hundred."""
    count = min(max(cloud.num_neighbors, cloud.frame_neighbors) + 1, len(cloud))
    distances, nodes = cloud.search.query(cloud.array, count)
    radius = cloud.graph.radius[nodes[:, 0]]
    return min(
        float(np.quantile(_weights(cloud.array, distances[:, 1:], nodes[:, 1:], radius)[1], 0.99)), 0.5
    )


def _frames(near: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the nearest nodes' frames turned into the blend of all neighbours' planes, ``(q, D, m)``.

    Continuous in the point: at a node the blend is the node's own plane.
    """
    # Σ_j c_j T_j (T_j'T_1): every plane is turned towards the first frame before the blend; then the nearest frame.
    first = near[:, 0]
    overlap = np.einsum("qjda,qdb->qjab", near, first)
    blended = np.einsum("qjda,qjab,qj->qdb", near, overlap, weights)
    left, _, right = np.linalg.svd(blended, full_matrices=False)
    return left @ right


def _weights(
    array: np.ndarray, distances: np.ndarray, nodes: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights c for every point, ``(q, K)``, and the variance ``1 - 2c'k(x) + c'Kc (q,)`` of what they leave open."""
    out, doubt = np.empty(nodes.shape), np.empty(len(nodes))
    nugget = _NUGGET * np.eye(nodes.shape[1])
    for start in range(0, len(nodes), _BLOCK):
        part = slice(start, start + _BLOCK)
        # c = K⁻¹ k(x) in units of the local radius, and what is left open, 1 - k(x)'c.
        near = array[nodes[part]] / radius[part, None, None]
        # |a - b|² by differences, which keeps near neighbours apart far from the origin
        apart = ((near[:, :, None] - near[:, None]) ** 2).sum(-1)
        gram = _correlation(np.sqrt(apart)) + nugget
        cross = _correlation(distances[part] / radius[part, None])
        c = np.linalg.solve(gram, cross[..., None])[..., 0]
        wild = (c**2).sum(1) > 1.0
        if wild.any():
            c[wild] = _bounded(gram[wild], cross[wild])
        out[part] = c
        # 1 - 2 c'k + c'Kc, which is 1 - c'k where the bound isn't reached
        doubt[part] = 1.0 - 2.0 * (c * cross).sum(1) + np.einsum("qi,qij,qj->q", c, gram, c)
    return out, doubt


def _bounded(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Return the weights ``(q, K)`` of length one that leave least open."""
    # c = (K + ρI)⁻¹ k with the multiplier ρ > 0 at which |c|² = Σ_j (v_j'k)² / (λ_j + ρ)² = 1, which falls in ρ: by bisection of log ρ
    values, vectors = np.linalg.eigh(gram)
    along = np.einsum("qij,qi->qj", vectors, cross)
    low, high = np.full(len(gram), math.log(_NUGGET) - 10.0), np.full(len(gram), math.log(gram.shape[1]))
    for _ in range(60):
        middle = 0.5 * (low + high)
        long = ((along / (values + np.exp(middle)[:, None])) ** 2).sum(1) > 1.0
        low, high = np.where(long, middle, low), np.where(long, high, middle)
    return np.einsum("qij,qj->qi", vectors, along / (values + np.exp(high)[:, None]))


def _correlation(distances: np.ndarray) -> np.ndarray:
    """Return the reader's Matérn correlation of smoothness 3/2 at distances in local radii."""
    r = math.sqrt(3.0) * distances / _REACH
    return (1.0 + r) * np.exp(-r)


def _along_the_mesh(
    cloud: PointCloud, points: np.ndarray, nearest: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices nearest to each point among those within two edges of its nearest vertex, nearest first.

    The two sides of a fold are near in space and far along the surface.
    """
    rings = cloud.two_rings
    width = max(len(rings[i]) for i in np.unique(nearest))
    found = np.stack([np.resize(rings[i], width) for i in nearest])
    distances = np.linalg.norm(cloud.array[found] - points[:, None], axis=-1)
    # vertices repeated to fill a row count once
    fill = np.arange(width) >= np.array([len(rings[i]) for i in nearest])[:, None]
    order = np.argsort(np.where(fill, np.inf, distances), axis=1)[:, : min(count, min(len(r) for r in rings))]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(found, order, 1)
