"""Neighbourhood graphs of a point cloud: who is near whom, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components

from stochdyn._checks import as_tensor, check_choice, check_positive_int, check_real
from stochdyn.errors import DisconnectedGraphError, InvalidInputError, MissingDependencyError

__all__ = ["NeighborGraph", "NeighborSearch", "farthest_points", "neighbor_graph"]

#: Width of the Gaussian weights, in units of the two points' own distances to their farthest neighbour.
BANDWIDTH = 0.3
#: Components that an error message lists.
_LISTED = 4


@contextmanager
def _kept_threads() -> Iterator[None]:
    """Give torch its number of threads back: numba sets that of the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NeighborSearch:
    """Nearest neighbours by scikit-learn's trees, or approximately by pynndescent.

    Args:
        points: The points ``(n, D)``.
        method: The search: ``"exact"`` or ``"approximate"``; the second needs the extra ``neighbors``.

    Raises:
        MissingDependencyError: If pynndescent is asked for and isn't installed.
    """

    def __init__(self, points: np.ndarray, method: str = "exact") -> None:
        check_choice(method, ("exact", "approximate"), "search")
        self.points = points
        if method == "exact":
            from sklearn.neighbors import NearestNeighbors

            self._tree = NearestNeighbors().fit(points)
            return
        try:
            from pynndescent import NNDescent
        except ImportError as error:
            raise MissingDependencyError(
                "the approximate search needs pynndescent", hint="pip install 'stochdyn[neighbors]'"
            ) from error
        self._tree = None
        # A single process, and a fixed seed: the graph must not change from run to run.
        with _kept_threads():
            self._index = NNDescent(
                points, n_neighbors=max(30, min(60, len(points) - 1)), random_state=0, n_jobs=1
            )

    def to_storage(self) -> dict[str, object]:
        """Return what the search is made of: the trees themselves are made again."""
        return {"points": self.points, "method": "approximate" if self._tree is None else "exact"}

    @classmethod
    def from_storage(cls, state: Mapping[str, Any]) -> NeighborSearch:
        """Return the search that :meth:`to_storage` described."""
        return cls(state["points"], state["method"])

    def query(self, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return distances and nodes ``(q, count)`` of the nearest nodes, nearest first."""
        if self._tree is not None:
            return self._tree.kneighbors(points, count)
        with _kept_threads():
            nodes, distances = self._index.query(points, k=count)
        return distances.astype(np.float64), nodes.astype(np.int64)


@dataclass(frozen=True)
class NeighborGraph:
    """A weighted graph, each edge once with ``tails < heads``.

    Attributes:
        tails: The node at one end of every edge, ``(E,)``.
        heads: The node at the other end of every edge, ``(E,)``.
        weights: The positive weights of the edges, ``(E,)``.
        lengths: The Euclidean lengths of the edges, ``(E,)``.
        radius: The distance of every node to the last of its neighbours, ``(n,)``.
        density: The sum of the Gaussian weights at every node, ``(n,)``, by which the density of the points is divided out.
        weighting: The kind of weights: ``"gaussian"`` or ``"connectivity"``.
        bandwidth: The width of Gaussian weights, relative to the radii.
    """

    tails: np.ndarray
    heads: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    radius: np.ndarray
    density: np.ndarray
    weighting: str = "gaussian"
    bandwidth: float = BANDWIDTH

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.radius)

    @property
    def degree(self) -> np.ndarray:
        """Sum of the weights at every node, ``(n,)``."""
        return self.gather(self.weights)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Sum a quantity of the edges ``(E,)`` at every node, ``(n,)``."""
        n = self.num_nodes
        return np.bincount(self.tails, values, n) + np.bincount(self.heads, values, n)

    def matrix(self) -> sp.csr_matrix:
        """Return the symmetric matrix of weights, ``(n, n)``."""
        n = self.num_nodes
        half = sp.coo_matrix((self.weights, (self.tails, self.heads)), (n, n)).tocsr()
        return half + half.T

    def components(self) -> np.ndarray:
        """Return the number of the connected component of every node, ``(n,)``."""
        return connected_components(self.matrix(), directed=False)[1]

    def require_connected(self) -> None:
        """Raise DisconnectedGraphError unless every node can be reached from every other."""
        labels = self.components()
        sizes = np.bincount(labels)
        if len(sizes) == 1:
            return
        order = np.argsort(-sizes)
        listing = ", ".join(
            f"component {label} of {sizes[label]} nodes (such as {_some(labels, label)})"
            for label in order[:_LISTED]
        )
        if len(sizes) > _LISTED:
            listing += f", and {len(sizes) - _LISTED} smaller ones"
        raise DisconnectedGraphError(
            "the graph of the points falls apart",
            got=f"{len(sizes)} components: {listing}",
            expected="one",
            hint="take more neighbours, drop stray points, or pass allow_disconnected=True",
        )

    def rings(self, hops: int) -> list[np.ndarray]:
        """Return, for every node, the nodes within so many edges of it, itself first."""
        n = self.num_nodes
        link = sp.coo_matrix((np.ones(len(self.tails)), (self.tails, self.heads)), (n, n)).tocsr()
        link = link + link.T + sp.identity(n, format="csr")
        reach = link
        for _ in range(hops - 1):
            reach = reach @ link
        parts = np.split(reach.indices, reach.indptr[1:-1])
        return [np.concatenate([[i], part[part != i]]) for i, part in enumerate(parts)]


def _some(labels: np.ndarray, label: int) -> str:
    return ", ".join(map(str, np.flatnonzero(labels == label)[:3]))


def neighbor_graph(
    points: np.ndarray,
    distances: np.ndarray,
    nodes: np.ndarray,
    *,
    kind: str = "knn",
    weighting: str = "gaussian",
    bandwidth: float = BANDWIDTH,
    density_correction: float = 1.0,
) -> NeighborGraph:
    r"""Build a graph out of each point's nearest neighbours.

    An edge joins two points if one is among the neighbours of the other (``"knn"``), or, for ``"cknn"``, if
    :math:`|x_i-x_j|^2<r_ir_j` with the distances :math:`r` to the last neighbour. Its weight is 1
    (``"connectivity"``), or

    .. math:: w_{ij}=\frac{g_{ij}}{(p_ip_j)^a},\qquad g_{ij}=e^{-|x_i-x_j|^2/(b\,r_ir_j)},\quad p_i=\sum_jg_{ij},

    so that with :math:`a=1` an uneven density of the points leaves no trace in the limit.

    Args:
        points: The points ``(n, D)``.
        distances: The distances ``(n, K)`` to the nearest other points, nearest first.
        nodes: The numbers ``(n, K)`` of those points.
        kind: Which points are joined: ``"knn"``, or ``"cknn"`` where the density of the points varies by orders of
            magnitude.
        weighting: The weights of the edges: ``"gaussian"`` or ``"connectivity"``.
        bandwidth: The width b of Gaussian weights, relative to the product of the two radii.
        density_correction: The power a of the density by which weights are divided.

    Raises:
        InvalidInputError: If points coincide.

    Reference:
        Coifman and Lafon, "Diffusion maps", 2006; Berry and Sauer, "Consistent manifold representation for
        topological data analysis", 2019 (continuous k-nearest neighbours).
    """
    check_choice(kind, ("knn", "cknn"), "graph")
    check_choice(weighting, ("gaussian", "connectivity"), "weights")
    n, count = nodes.shape
    spread = float(np.linalg.norm(np.ptp(points, axis=0)))
    same = np.argwhere(distances <= 1e-13 * spread)
    if len(same):
        i, j = int(same[0, 0]), int(nodes[same[0, 0], same[0, 1]])
        raise InvalidInputError(
            "points must differ from one another",
            got=f"points {min(i, j)} and {max(i, j)} coincide ({len(np.unique(same[:, 0]))} points are concerned)",
            hint="keep one of each, for example by numpy.unique(points, axis=0)",
        )
    radius = distances[:, -1]
    first = np.repeat(np.arange(n), count)
    near = sp.coo_matrix((distances.ravel(), (first, nodes.ravel())), (n, n)).tocsr()
    upper = sp.triu(near.maximum(near.T), 1).tocoo()
    tails, heads, lengths = upper.row.astype(np.int64), upper.col.astype(np.int64), upper.data
    if kind == "cknn":
        keep = lengths**2 < radius[tails] * radius[heads]
        tails, heads, lengths = tails[keep], heads[keep], lengths[keep]
    weights: np.ndarray = np.ones_like(lengths)
    density: np.ndarray = np.ones(n)
    if weighting == "gaussian":
        # g_ij, the density p_i, and w_ij = g_ij / (p_i p_j)^a (Coifman and Lafon, section 3).
        weights = np.exp(-(lengths**2) / (bandwidth * radius[tails] * radius[heads]))
        density = np.bincount(tails, weights, n) + np.bincount(heads, weights, n)
        density = np.maximum(density / density.mean(), 1e-12) ** density_correction
        weights = weights / (density[tails] * density[heads])
    return NeighborGraph(tails, heads, weights, lengths, radius, density, weighting, bandwidth)


def farthest_points(points: Any, num_points: int | None = None, spacing: float | None = None) -> np.ndarray:
    """Choose points that cover a cloud evenly, each the farthest from those chosen before.

    Args:
        points: The points ``(n, D)``, an array of any kind; the first one is the start.
        num_points: The number of points to choose, or None to go on until ``spacing``.
        spacing: The share of the bounding box's diagonal to which the points are thinned: the choice ends once every point
            is nearer than this to a chosen one.

    Returns:
        ``(q,)`` indices in order of choice, in time and memory n times q and n.

    Raises:
        InvalidInputError: Unless exactly one of ``num_points`` and ``spacing`` is given.

    Reference:
        Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    if (num_points is None) == (spacing is None):
        raise InvalidInputError(
            "give either num_points or spacing", got=f"num_points={num_points}, spacing={spacing}"
        )
    points = (
        as_tensor(points, "points", 2, "(number of points, ambient dimension)")
        .detach()
        .cpu()
        .double()
        .numpy()
    )
    if num_points is None:
        check_real(spacing, "spacing", above=0.0)
    else:
        check_positive_int(num_points, "num_points")
    stop = 0.0 if spacing is None else spacing * float(np.linalg.norm(np.ptp(points, axis=0)))
    chosen = [0]
    nearest = ((points - points[0]) ** 2).sum(1)
    limit = len(points) if num_points is None else min(num_points, len(points))
    while len(chosen) < limit:
        far = int(nearest.argmax())
        if nearest[far] <= stop**2:
            break
        chosen.append(far)
        np.minimum(nearest, ((points - points[far]) ** 2).sum(1), out=nearest)
    return np.array(chosen)
