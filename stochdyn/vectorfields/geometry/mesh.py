"""Graph, frames and masses of a triangle mesh, by linear finite elements."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.geometry.graph import NeighborGraph

__all__ = ["check_faces", "mesh_graph", "vertex_areas", "vertex_frames"]

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
    return faces.astype(np.int64)


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


def vertex_frames(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return tangent frames ``(n, 3, 2)`` orthogonal to the vertex normals, turning with the faces' orientation."""
    normals = _normals(vertices, faces)
    total = [np.bincount(faces.ravel(), np.repeat(normals[:, d], 3), len(vertices)) for d in range(3)]
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
