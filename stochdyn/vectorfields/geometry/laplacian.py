"""Sparse Laplacians of a graph, of functions and of vector fields, in absolute units of 1 / length squared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stochdyn._checks import check_choice
from stochdyn.vectorfields.geometry.graph import NeighborGraph

__all__ = ["NORMALIZATIONS", "Pencil", "assemble", "masses"]

NORMALIZATIONS = ("local", "degree", "none")


@dataclass(frozen=True)
class Pencil:
    r"""The pair of matrices of the eigenproblem :math:`L u=\lambda M u` with a diagonal M.

    Attributes:
        matrix: L, symmetric ``(n f, n f)``, or Hermitian ``(n, n)`` where two real components are one complex number.
        mass: The diagonal of M, one entry per node, ``(n,)``.
        fibre: The number f of real components per node.
        paired: Whether the matrix is the Hermitian form of a field on an oriented surface.
    """

    matrix: sp.csr_matrix
    mass: np.ndarray
    fibre: int
    paired: bool

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.mass)

    @property
    def size(self) -> int:
        """Number of real unknowns."""
        return self.num_nodes * self.fibre

    def row_mass(self) -> np.ndarray:
        """Return the diagonal of M in the unknowns of the matrix."""
        return self.mass if self.paired else np.repeat(self.mass, self.fibre)

    def symmetric(self) -> sp.csc_matrix:
        r"""Return :math:`M^{-1/2}LM^{-1/2}`, which has the same eigenvalues."""
        scale = sp.diags(1.0 / np.sqrt(self.row_mass()))
        return (scale @ self.matrix @ scale).tocsc()

    def to_fields(self, vectors: np.ndarray) -> np.ndarray:
        """Turn columns of unknowns ``(rows, k)`` into fields ``(n, f, k)``, or ``(n, 2, k)`` of complex ones' parts."""
        if self.paired:
            return np.stack([vectors.real, vectors.imag], 1)
        return vectors.reshape(self.num_nodes, self.fibre, -1)

    def from_fields(self, fields: np.ndarray) -> np.ndarray:
        """Turn fields ``(n, f, k)`` into columns of unknowns."""
        if self.paired:
            return fields[:, 0] + 1j * fields[:, 1]
        return fields.reshape(self.num_nodes * self.fibre, -1)


def masses(graph: NeighborGraph, dim: int, normalization: str) -> np.ndarray:
    r"""Return the masses M that give the Laplacian its absolute scale, ``(n,)``.

    A Taylor expansion of a smooth function at a node gives
    :math:`\sum_jw_{ij}(f_i-f_j)\approx-\tfrac1{2m}\big(\sum_jw_{ij}|x_i-x_j|^2\big)\Delta f`, so that

    - ``"local"``: :math:`M_i=\tfrac1{2m}\sum_jw_{ij}|x_i-x_j|^2` calibrates every node by itself;
    - ``"degree"``: :math:`M_i\propto\sum_jw_{ij}`, the random-walk Laplacian;
    - ``"none"``: M constant, the unnormalised Laplacian;

    the last two with the factor that calibrates the whole graph on average.

    Args:
        graph: The graph of neighbours.
        dim: The dimension m of the manifold.
        normalization: One of the three choices above.
    """
    check_choice(normalization, NORMALIZATIONS, "normalization")
    # The second moment Σ_j w_ij |x_i - x_j|² / 2m, which the Taylor expansion above divides by.
    moment = graph.gather(graph.weights * graph.lengths**2) / (2.0 * dim)
    if normalization == "local":
        return moment
    shape = graph.degree if normalization == "degree" else np.ones(graph.num_nodes)
    return shape * (moment.sum() / shape.sum())


def assemble(graph: NeighborGraph, mass: np.ndarray, maps: np.ndarray | None, paired: bool = False) -> Pencil:
    r"""Assemble :math:`L_{ii}=\sum_jw_{ij}I,\ L_{ij}=-w_{ij}O_{ij}`.

    Its quadratic form is :math:`\sum_{i<j}w_{ij}|v_i-O_{ij}v_j|^2`, hence not negative.

    Args:
        graph: The graph of neighbours.
        mass: The diagonal of M, one entry per node, ``(n,)``.
        maps: The connections ``(E, m, m)`` from heads to tails; None for the Laplacian of functions.
        paired: Whether rotations of the plane are written as complex numbers.

    Reference:
        Singer and Wu, "Vector diffusion maps and the connection Laplacian", 2012, section 3.
    """
    n, degree = graph.num_nodes, graph.degree
    if maps is None:
        return Pencil((sp.diags(degree) - graph.matrix()).tocsr(), mass, 1, False)
    if paired:
        # A rotation by θ is multiplication by e^{iθ}, the first column of its matrix: half the size, and pairs stay whole.
        turn = graph.weights * (maps[:, 0, 0] + 1j * maps[:, 1, 0])
        half = sp.coo_matrix((turn, (graph.tails, graph.heads)), (n, n)).tocsr()
        return Pencil((sp.diags(degree.astype(complex)) - half - half.conj().T).tocsr(), mass, 2, True)
    m = maps.shape[-1]
    # Off-diagonal blocks -w_ij O_ij, and their transposes; the degrees on the diagonal.
    rows = m * graph.tails[:, None, None] + np.arange(m)[None, :, None]
    columns = m * graph.heads[:, None, None] + np.arange(m)[None, None, :]
    rows, columns = np.broadcast_arrays(rows, columns)
    blocks = graph.weights[:, None, None] * maps
    half = sp.coo_matrix((blocks.ravel(), (rows.ravel(), columns.ravel())), (n * m, n * m)).tocsr()
    return Pencil((sp.diags(np.repeat(degree, m)) - half - half.T).tocsr(), mass, m, False)
