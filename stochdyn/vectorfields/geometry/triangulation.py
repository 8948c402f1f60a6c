"""Triangulations of point clouds on surfaces, and what they are worth: Euler characteristic, gaps and overlaps."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import Delaunay

from stochdyn.errors import ApproximationWarning

if TYPE_CHECKING:
    from stochdyn.vectorfields.geometry.cloud import PointCloud

__all__ = ["Triangulation", "inspect_triangles", "triangles_of"]

#: An edge longer than this many local radii joins what the graph doesn't.
_LONG = 1.6
#: Holes of up to this many edges are closed, unless they are wider than so many distances to a sixth neighbour: those are
#: borders of the surface. In an even cloud a hole of ten edges is 3.2 such distances wide.
_SMALL_HOLE, _WIDE = 10, 3.6


@dataclass(frozen=True)
class Triangulation:
    """What a set of triangles looks like.

    Attributes:
        euler: The number of vertices used, less edges, plus triangles: 2 for a closed surface like a sphere, 0 for a torus,
            1 for a disc.
        boundaries: The number of closed curves that bound it: 0 for a closed surface, 1 for a disc.
        gaps: The number of these that have at most ten edges, and look like holes of the triangulation rather than of the
            surface.
        overlaps: The number of edges with more than two triangles.
        unused: The number of nodes in no triangle.
    """

    euler: int
    boundaries: int
    gaps: int
    overlaps: int
    unused: int

    @property
    def is_sound(self) -> bool:
        """Whether it is a surface that covers all nodes without gaps."""
        return not (self.gaps or self.overlaps or self.unused)

    def __str__(self) -> str:
        return (
            f"Euler characteristic {self.euler}, {self.boundaries} boundaries, {self.gaps} gaps, "
            f"{self.overlaps} edges of more than two triangles, {self.unused} nodes in no triangle"
        )


def inspect_triangles(faces: np.ndarray, num_nodes: int) -> Triangulation:
    """Return what triangles ``(F, 3)`` over so many nodes look like."""
    edges, counts = _edges(faces)
    used = len(np.unique(faces))
    loops = _boundary_loops(edges[counts == 1])
    gaps = sum(len(loop) <= _SMALL_HOLE for loop in loops)
    return Triangulation(
        used - len(edges) + len(faces), len(loops), gaps, int((counts > 2).sum()), num_nodes - used
    )


def triangles_of(cloud: PointCloud) -> np.ndarray:
    """Return triangles ``(F, 3)`` that cover the surface of a cloud.

    Every node proposes the triangles around it in the Delaunay triangulation of its neighbours in the tangent plane.
    They are taken one after the other, those that most of their corners propose first, as long as no edge gets a third
    triangle and no two triangles at a node overlap; small holes that are left are closed.

    Warns:
        ApproximationWarning: If gaps, overlaps or nodes in no triangle remain.

    Reference:
        Boissonnat and Ghosh, "Manifold reconstruction using tangential Delaunay complexes", 2014, where the proposals are from.
    """
    x = cloud.array
    nodes = cloud.search.query(x, min(2 * cloud.frame_neighbors + 1, len(cloud)))[1]
    flat = (x[nodes] - x[:, None]) @ cloud.node_frames
    found = []
    for i in range(len(cloud)):
        star = Delaunay(flat[i]).simplices
        here = int(np.flatnonzero(nodes[i] == i)[0])
        found.append(nodes[i][star[(star == here).any(1)]])
    triangles, votes = np.unique(np.sort(np.concatenate(found), axis=1), axis=0, return_counts=True)
    keep = _supported(cloud, triangles)
    triangles, votes = triangles[keep], votes[keep]
    # Greedy choice: triangles that more corners propose first, of these the smaller ones first.
    size = np.linalg.norm(x[triangles] - x[np.roll(triangles, -1, 1)], axis=-1).max(1)
    taken: list[list[int]] = []
    count: dict[tuple[int, int], int] = defaultdict(int)
    fans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index in np.lexsort((size, -votes)):
        a, b, c = triangles[index].tolist()
        sides = [(a, b), (b, c), (a, c)]
        if any(count[side] >= 2 for side in sides):
            continue
        if votes[index] < 3 and any(
            _crosses(cloud, v, w, fans[v]) for v, w in ((a, (b, c)), (b, (a, c)), (c, (a, b)))
        ):
            continue
        taken.append([a, b, c])
        for side in sides:
            count[side] += 1
        for v, w in ((a, (b, c)), (b, (a, c)), (c, (a, b))):
            fans[v].append(w)
    faces, borders = _close_holes(cloud, np.asarray(taken, dtype=np.int64).reshape(-1, 3))
    report = inspect_triangles(faces, len(cloud))
    report = replace(report, gaps=report.gaps - borders)
    if not report.is_sound:
        warnings.warn(
            f"The triangulation isn't a surface through all nodes ({report}), so zeros may be lost or counted twice. "
            "Take more or more evenly spread points, or a mesh (PointCloud.from_mesh).",
            ApproximationWarning,
            stacklevel=4,
        )
    return faces


def _edges(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every edge once, ``(E, 2)``, and how many triangles have it."""
    pairs = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    return np.unique(pairs, axis=0, return_counts=True)


def _boundary_loops(edges: np.ndarray) -> list[list[int]]:
    """Return the closed curves that edges with one triangle make up, as lists of nodes."""
    near: dict[int, list[int]] = defaultdict(list)
    for a, b in edges.tolist():
        near[a].append(b)
        near[b].append(a)
    loops = []
    left = {tuple(edge) for edge in edges.tolist()}
    while left:
        a, b = left.pop()
        loop = [a, b]
        while loop[-1] != loop[0]:
            here = loop[-1]
            ahead = [n for n in near[here] if (min(n, here), max(n, here)) in left]
            if not ahead:
                break
            left.discard((min(ahead[0], here), max(ahead[0], here)))
            loop.append(ahead[0])
        loops.append(loop[:-1] if loop[-1] == loop[0] else loop)
    return loops


def _supported(cloud: PointCloud, faces: np.ndarray) -> np.ndarray:
    """Return which triangles have no edge that is long for the neighbourhoods of its ends, ``(F,)``."""
    radius, x = cloud.graph.radius, cloud.array
    after = np.roll(faces, -1, axis=1)
    lengths = np.linalg.norm(x[faces] - x[after], axis=-1)
    return (lengths <= _LONG * np.maximum(radius[faces], radius[after])).all(1)


def _crosses(cloud: PointCloud, apex: int, wedge: tuple[int, int], fan: list[tuple[int, int]]) -> bool:
    """Return whether a wedge at a node overlaps one that is there already, in the node's tangent plane."""
    ways = {
        n: cloud.node_frames[apex].T @ (cloud.array[n] - cloud.array[apex]) for w in [wedge, *fan] for n in w
    }
    angle = {n: float(np.arctan2(v[1], v[0])) for n, v in ways.items()}

    def span(pair: tuple[int, int]) -> tuple[float, float]:
        low, high = angle[pair[0]], angle[pair[1]]
        turn = (high - low) % (2 * np.pi)
        return (low, turn) if turn <= np.pi else (high, 2 * np.pi - turn)

    start, width = span(wedge)
    for other in fan:
        begin, broad = span(other)
        ahead, behind = (begin - start) % (2 * np.pi), (start - begin) % (2 * np.pi)
        if (ahead < width - 1e-9 and ahead < 2 * np.pi - 1e-9) or behind < broad - 1e-9:
            return True
    return False


def _is_wide(cloud: PointCloud, loop: list[int]) -> bool:
    """Return whether a closed curve is too wide for a hole that the choice of triangles left: a border, as of a small open cap."""
    x, count = cloud.array, min(7, len(cloud))
    around = np.unique(cloud.search.query(x[loop], count)[1])
    apart = np.median(cloud.search.query(x[around], count)[0][:, -1])
    return bool(np.linalg.norm(x[loop][:, None] - x[loop], axis=-1).max() > _WIDE * apart)


def _close_holes(cloud: PointCloud, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Fill holes of few edges by cutting off the ear with the shortest chord, again and again; and count borders of few edges."""
    edges, counts = _edges(faces)
    known = {tuple(e): int(c) for e, c in zip(edges.tolist(), counts, strict=True)}
    more, borders = [], 0
    for loop in _boundary_loops(edges[counts == 1]):
        if len(loop) > _SMALL_HOLE or len(set(loop)) != len(loop):
            continue
        if _is_wide(cloud, loop):
            borders += 1
            continue
        ring = list(loop)
        while len(ring) > 3:
            chords = []
            for k in range(len(ring)):
                a, b = ring[k - 1], ring[(k + 1) % len(ring)]
                free = known.get((min(a, b), max(a, b)), 0) == 0
                chords.append((np.linalg.norm(cloud.array[a] - cloud.array[b]) if free else np.inf, k))
            length, k = min(chords)
            if not np.isfinite(length):
                break
            a, v, b = ring[k - 1], ring[k], ring[(k + 1) % len(ring)]
            more.append([a, v, b])
            known[min(a, b), max(a, b)] = 1
            ring.pop(k)
        if len(ring) == 3:
            more.append(ring)
    return np.concatenate([faces, np.asarray(more, dtype=np.int64).reshape(-1, 3)]), borders
