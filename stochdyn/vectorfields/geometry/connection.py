"""The discrete connection: orthogonal maps between neighbouring tangent spaces, orientation, holonomy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

__all__ = ["connect", "holonomy", "orient", "polar_factor"]

#: Tangent spaces at more than 60 degrees to one another don't tell each other's handedness.
_PARALLEL = 0.5


def polar_factor(matrices: np.ndarray) -> np.ndarray:
    r"""Return the orthogonal matrix nearest to each of ``(..., m, m)``.

    The orthogonal factor :math:`UV^\top` of :math:`M=U\Sigma V^\top`; in two dimensions in closed form, with
    :math:`s=\operatorname{sign}\det M`,

    .. math:: O\propto\begin{pmatrix}a+sd&b-sc\\c-sb&d+sa\end{pmatrix}
        \quad\text{for}\quad M=\begin{pmatrix}a&b\\c&d\end{pmatrix}.

    Reference:
        Higham, "Computing the polar decomposition", 1986.
    """
    size = matrices.shape[-1]
    if size == 1:
        return np.where(matrices >= 0, 1.0, -1.0)
    if size == 2:
        a, b, c, d = (matrices[..., i, j] for i in (0, 1) for j in (0, 1))
        s = np.where(a * d - b * c >= 0, 1.0, -1.0)
        x, y = a + s * d, c - s * b
        length = np.hypot(x, y)
        safe = np.where(length > 0, length, 1.0)
        x, y = np.where(length > 0, x / safe, 1.0), y / safe
        return np.stack([np.stack([x, -s * y], -1), np.stack([y, s * x], -1)], -2)
    u, _, vt = np.linalg.svd(matrices)
    return u @ vt


def connect(frames: np.ndarray, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
    r"""Return the map from the tangent space at each head to that at its tail, ``(E, m, m)``.

    .. math:: O_{ij}=\arg\min_{O\in O(m)}\|T_iO-T_j\|=\operatorname{polar}(T_i^\top T_j),

    which equals parallel transport along the geodesic on every sphere, and up to third order in the
    distance elsewhere.

    Args:
        frames: The tangent frames ``(n, D, m)``.
        tails: The node at one end of every edge, ``(E,)``.
        heads: The node at the other end of every edge, ``(E,)``.

    Reference:
        Singer and Wu, "Vector diffusion maps and the connection Laplacian", 2012, section 2.2.
    """
    return polar_factor(np.einsum("eda,edb->eab", frames[tails], frames[heads]))


def orient(
    num_nodes: int, tails: np.ndarray, heads: np.ndarray, maps: np.ndarray, overlap: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """Choose the handedness of every frame so that neighbours agree, along the spanning tree of the most parallel ones.

    Args:
        num_nodes: The number n of nodes.
        tails: The node at one end of every edge, ``(E,)``.
        heads: The node at the other end of every edge, ``(E,)``.
        maps: The connections ``(E, m, m)`` from heads to tails.
        overlap: The least cosine between the two tangent spaces of every edge, ``(E,)``. Where it is small the connection's
            handedness is an accident, and such edges have no vote. All vote if None.

    Returns:
        Signs ``(n,)``, -1 for frames to be reflected, and whether all neighbours then agree: a graph where
        they can't is not orientable.
    """
    sign = np.sign(np.linalg.det(maps)) if maps.shape[-1] != 2 else _sign_of_plane_maps(maps)
    sure = np.ones(len(tails), dtype=bool) if overlap is None else overlap > _PARALLEL
    link = sp.coo_matrix((sign, (tails, heads)), (num_nodes, num_nodes)).tocsr()
    link = link + link.T
    if overlap is not None:
        cost = sp.coo_matrix((1.001 - np.clip(overlap, 0, 1), (tails, heads)), (num_nodes, num_nodes)).tocsr()
        tree = minimum_spanning_tree(cost)
        link = link.multiply((tree + tree.T) > 0).tocsr()
    # A node has the sign of its parent in the tree times that of det O between the two (Singer and Wu, section 3).
    signs = np.zeros(num_nodes)
    for root in range(num_nodes):
        if signs[root]:
            continue
        order, before = breadth_first_order(link, root, directed=False)
        relative = np.asarray(link[order[1:], before[order[1:]]]).ravel()
        signs[root] = 1.0
        for node, parent, change in zip(order[1:], before[order[1:]], relative, strict=True):
            signs[node] = signs[parent] * change
    return signs, bool(np.all((signs[tails] * signs[heads] * sign)[sure] > 0))


def _sign_of_plane_maps(maps: np.ndarray) -> np.ndarray:
    return np.sign(maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0])


def holonomy(frames: np.ndarray, loop: Sequence[int]) -> np.ndarray:
    """Return the map ``(m, m)`` that a vector undergoes when carried around a closed loop of nodes.

    Carried from ``loop[0]`` to ``loop[1]`` and so on, and back to ``loop[0]``. On a surface it is a rotation by the
    curvature that the loop encloses: by 90 degrees for an eighth of the unit sphere.
    """
    nodes = np.asarray(loop)
    # The product O_{r,r-1} ... O_{21} O_{1r} of the maps along the loop, the last step first.
    steps = connect(frames, np.roll(nodes, -1), nodes)
    total = np.eye(frames.shape[2])
    for step in steps:
        total = step @ total
    return total
