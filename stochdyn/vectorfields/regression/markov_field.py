"""Parts of sparse Gaussian fields: their mean variance by quadrature, and roots of their precisions to draw from."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch

from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.laplacian import Pencil

__all__ = ["MeanVariance", "Normals", "root_sample"]

#: Up to this many unknowns all eigenvalues are computed to normalise the prior.
_DENSE = 1500
_PROBES, _DEPTH, _LOW = 24, 60, 60


class Normals:
    """Standard normal arrays; complex ones have independent standard parts."""

    def __init__(self, generator: torch.Generator | None, paired: bool) -> None:
        self.generator, self.paired = generator, paired

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw an array of a shape."""
        parts = (2, *shape) if self.paired else (1, *shape)
        device = "cpu" if self.generator is None else self.generator.device
        drawn = torch.randn(parts, generator=self.generator, dtype=torch.float64, device=device).cpu().numpy()
        return drawn[0] + 1j * drawn[1] if self.paired else drawn[0]


def root_sample(cloud: PointCloud, pencil: Pencil, shift: float, count: int, draw: Normals) -> np.ndarray:
    """Draw columns with covariance ``M^{-1/2} L M^{-1/2} + shift``: one independent draw per edge and one per node."""
    graph, n = cloud.graph, pencil.num_nodes
    edges, m = len(graph.tails), pencil.fibre
    root, each = np.sqrt(graph.weights), np.arange(len(graph.tails))
    maps = cloud.connections.cpu().double().numpy()
    if pencil.paired:
        away = root * (maps[:, 0, 0] + 1j * maps[:, 1, 0])
        ends = sp.coo_matrix(
            (np.concatenate([root, -away]), (np.tile(each, 2), np.concatenate([graph.tails, graph.heads]))),
            (edges, n),
        )
    else:
        at = np.arange(m)
        first = sp.coo_matrix(
            (np.repeat(root, m), ((each[:, None] * m + at).ravel(), (graph.tails[:, None] * m + at).ravel())),
            (edges * m, n * m),
        )
        rows, columns = np.broadcast_arrays(
            each[:, None, None] * m + at[:, None], graph.heads[:, None, None] * m + at[None, :]
        )
        blocks = root[:, None, None] * maps
        second = sp.coo_matrix((blocks.ravel(), (rows.ravel(), columns.ravel())), (edges * m, n * m))
        ends = first.tocsr() - second.tocsr()
    incidence = ends.tocsr() @ sp.diags(1.0 / np.sqrt(pencil.row_mass()))
    edges = incidence.conj().T @ draw((incidence.shape[0], count))
    return np.asarray(edges + math.sqrt(shift) * draw((incidence.shape[1], count)))


class MeanVariance:
    r"""The mean of the variances of a field with precision :math:`M^{1/2}(s+A)^\nu M^{1/2}`, weighted by masses.

    .. math:: \frac{\operatorname{tr}(s+A)^{-\nu}}{f\sum_iM_i},\qquad A=M^{-1/2}LM^{-1/2}

    from all eigenvalues where there are few. Otherwise the lowest are computed and the rest is integrated by
    stochastic Lanczos quadrature, once for all s and ν (relative standard error under a hundredth).

    Args:
        cloud: The points that sample the manifold.
        pencil: The Laplacian L and the masses M.

    Reference:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017.
    """

    def __init__(self, cloud: PointCloud, pencil: Pencil) -> None:
        matrix = pencil.symmetric()
        size, twice = matrix.shape[0], 2 if pencil.paired else 1
        self.total = pencil.fibre * float(pencil.mass.sum())
        if size <= _DENSE:
            values = np.linalg.eigvalsh(matrix.toarray())
            self.nodes, self.weights = np.maximum(values, 0.0), np.full(size, float(twice))
            return
        k = min(_LOW, pencil.size // 4)
        low_values, modes = cloud.modes(k)
        basis = pencil.from_fields(modes.cpu().numpy()) * np.sqrt(pencil.row_mass())[:, None]
        if pencil.paired:
            basis = basis[:, ::2]
        basis = basis / np.linalg.norm(basis, axis=0)
        nodes, weights = _quadrature(matrix, basis, np.random.default_rng(0))
        low = low_values.cpu().numpy()
        self.nodes = np.concatenate([low, np.maximum(nodes, low[-1])])
        rest = (size - basis.shape[1]) * twice
        self.weights = np.concatenate([np.ones(len(low)), weights * rest])

    def __call__(self, shift: float, nu: int) -> float:
        """Return the mean variance for ``shift`` s and power ν."""
        return float((self.weights * (shift + self.nodes) ** (-float(nu))).sum() / self.total)


def _quadrature(
    matrix: sp.csc_matrix, basis: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights that integrate functions of a matrix outside the span of ``basis``; weights sum to one."""
    nodes, weights = [], []
    for _ in range(_PROBES):
        v = rng.standard_normal(matrix.shape[0]).astype(matrix.dtype)
        v = v - basis @ (basis.conj().T @ v)
        v = v / np.linalg.norm(v)
        # Lanczos: the matrix in the Krylov basis of v is tridiagonal, with diagonal α and off-diagonal β.
        alphas, betas, before, beta = [], [], np.zeros_like(v), 0.0
        for _ in range(min(_DEPTH, matrix.shape[0] - basis.shape[1])):
            w = matrix @ v - beta * before
            alpha = float(np.vdot(v, w).real)
            w = w - alpha * v
            w = w - basis @ (basis.conj().T @ w)
            alphas.append(alpha)
            beta = float(np.linalg.norm(w))
            betas.append(beta)
            before, v = v, w / max(beta, 1e-300)
        # Gauss quadrature: nodes are the eigenvalues, weights the squared first entries of the eigenvectors.
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
        nodes.append(values)
        weights.append(vectors[0] ** 2 / _PROBES)
    return np.concatenate(nodes), np.concatenate(weights)
