"""Graph, frames and masses of a triangle mesh, by linear finite elements."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.geometry.graph import NeighborGraph

__all__ = ["check_faces", "check_vertices", "mesh_graph", "orient_faces", "vertex_areas", "vertex_frames"]

#: Cotangent weights under this share of the mean are raised to it, so that the Laplacian stays positive.
_LEAST = 1e-4


def check_faces(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Return faces as ``(F, 3)`` whole numbers, or raise a typed error."""
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise ShapeError("faces must be triangles", got=f"shape {faces.shape}", expected="(F, 3)")
    if faces.dtype.kind not in "iu":
        raise InvalidInputError("faces must hold whole numbers", got=faces.dtype)
    if faces.min() < 0 or faces.max() >= num_vertices:
        raise InvalidInputError(
            "faces refer to vertices that don't exist",
            got=f"{faces.min()} to {faces.max()}",
            expected=f"0 to {num_vertices - 1}",
        )
    unused = np.setdiff1d(np.arange(num_vertices), faces)
    if len(unused):
        raise InvalidInputError(
            "every vertex must belong to a face",
            got=f"vertex {unused[0]} and {len(unused) - 1} others belong to none",
        )
    ordered = np.sort(faces, 1)
    _, first, counts = np.unique(ordered, axis=0, return_index=True, return_counts=True)
    if len(first) < len(faces):
        raise InvalidInputError(
            "a face must come once",
            got=f"{faces[first[counts > 1][0]].tolist()} and {int((counts > 1).sum()) - 1} others more often",
            hint="keep one of each",
        )
    return faces.astype(np.int64)


def check_vertices(vertices: np.ndarray) -> None:
    """Raise if vertices coincide: the faces that meet there wouldn't be joined."""
    _, place, counts = np.unique(vertices, axis=0, return_inverse=True, return_counts=True)
    if len(counts) < len(vertices):
        one, other = np.flatnonzero(place.reshape(-1) == counts.argmax())[:2]
        raise InvalidInputError(
            "vertices must differ from one another, or faces that meet aren't joined",
            got=f"vertices {one} and {other} coincide ({len(vertices) - len(counts)} too many)",
            hint="merge them: vertices, place = numpy.unique(vertices, axis=0, return_inverse=True); faces = place.reshape(-1)[faces]",
        )


def orient_faces(faces: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return faces that all turn the same way, as most of each piece did, and whether there is such a way.

    Where there is none, as on a Möbius band, they are as they were.
    """
    count = len(faces)
    tails, heads = faces.reshape(-1), np.roll(faces, -1, 1).reshape(-1)
    owner = np.repeat(np.arange(count), 3)
    lower, upper = np.minimum(tails, heads), np.maximum(tails, heads)
    order = np.lexsort((upper, lower))
    lower, upper, owner, up = lower[order], upper[order], owner[order], (tails < heads)[order]
    first = np.flatnonzero(np.r_[True, (np.diff(lower) != 0) | (np.diff(upper) != 0)])
    pairs = first[np.diff(np.r_[first, len(lower)]) == 2]
    a, b, alike = owner[pairs], owner[pairs + 1], up[pairs] == up[pairs + 1]
    # two nodes for each face, as it is and turned round: neighbours agree if they run along their edge in opposite ways
    here = np.r_[a, a + count]
    there = np.r_[np.where(alike, b + count, b), np.where(alike, b, b + count)]
    links = sp.coo_matrix((np.ones(len(here)), (here, there)), (2 * count, 2 * count))
    _, piece = connected_components(links, directed=False)
    kept, turned = piece[:count], piece[count:]
    if (kept == turned).any():
        return faces, False
    # of the two ways of a piece the one that leaves more faces as they are
    votes = np.bincount(kept, minlength=piece.max() + 1)
    flip = (votes[turned] > votes[kept]) | ((votes[turned] == votes[kept]) & (turned < kept))
    return np.where(flip[:, None], faces[:, ::-1], faces), True


def _normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normals of the faces, as long as twice their area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    flat = np.flatnonzero(np.linalg.norm(normals, axis=1) <= 0)
    if len(flat):
        raise InvalidInputError(
            "faces must have an area", got=f"face {flat[0]} and {len(flat) - 1} others have none"
        )
    return normals


def vertex_areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return a third of the area of the faces around every vertex, ``(n,)``."""
    areas = np.linalg.norm(_normals(vertices, faces), axis=1) / 6.0
    return np.bincount(faces.ravel(), np.repeat(areas, 3), len(vertices))


def vertex_frames(vertices: np.ndarray, faces: np.ndarray, oriented: bool = True) -> np.ndarray:
    """Return tangent frames ``(n, 3, 2)`` orthogonal to the vertex normals, turning with the faces' orientation.

    Args:
        vertices: The vertices ``(n, 3)``.
        faces: The triangles ``(F, 3)``.
        oriented: Whether all faces turn the same way; otherwise normals of either sign are brought to one side, vertex by vertex.
    """
    corners = np.repeat(_normals(vertices, faces), 3, axis=0)
    if not oriented:
        # on which side a vertex's largest face looks
        largest = np.lexsort((-np.linalg.norm(corners, axis=1), faces.ravel()))
        _, place = np.unique(faces.ravel()[largest], return_index=True)
        side = corners[largest[place]][faces.ravel()]
        corners = corners * np.where((corners * side).sum(1) < 0, -1.0, 1.0)[:, None]
    total = [np.bincount(faces.ravel(), corners[:, d], len(vertices)) for d in range(3)]
    at = np.stack(total, 1).astype(np.float64)
    at = at / np.linalg.norm(at, axis=1, keepdims=True)
    # whichever axis is farthest from the normal starts the frame
    axis = np.eye(3)[np.abs(at).argmin(1)]
    first = np.cross(axis, at)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(at, first)], -1)


def mesh_graph(vertices: np.ndarray, faces: np.ndarray) -> NeighborGraph:
    r"""Return the graph of a mesh with the weights :math:`\tfrac12(\cot\alpha_{ij}+\cot\beta_{ij})`.

    Negative weights, which obtuse triangles give, are raised to a small positive one.

    Reference:
        Pinkall and Polthier, "Computing discrete minimal surfaces and their conjugates", 1993.
    """
    _normals(vertices, faces)
    n = len(vertices)
    total = sp.csr_matrix((n, n))
    for corner in range(3):
        apex, i, j = faces[:, corner], faces[:, (corner + 1) % 3], faces[:, (corner + 2) % 3]
        # cot α = u·v / |u × v| at the corner opposite to the edge (i, j); half of it goes to that edge.
        u, v = vertices[i] - vertices[apex], vertices[j] - vertices[apex]
        cot = (u * v).sum(1) / np.linalg.norm(np.cross(u, v), axis=1)
        total = total + sp.coo_matrix((0.5 * cot, (np.minimum(i, j), np.maximum(i, j))), (n, n)).tocsr()
    edges = total.tocoo()
    tails, heads = edges.row.astype(np.int64), edges.col.astype(np.int64)
    lengths = np.linalg.norm(vertices[tails] - vertices[heads], axis=1)
    weights = np.maximum(edges.data, _LEAST * np.abs(edges.data).mean())
    radius = np.zeros(n)
    np.maximum.at(radius, tails, lengths)
    np.maximum.at(radius, heads, lengths)
    return NeighborGraph(tails, heads, weights, lengths, radius, np.ones(n))
