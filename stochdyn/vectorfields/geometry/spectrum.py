"""The smallest eigenpairs of a sparse Laplacian, by shift and inversion with a symmetric factorisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, eigsh, splu

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.laplacian import Pencil

__all__ = ["factorise", "smallest_eigenpairs"]

#: Up to this many unknowns, or if most pairs are asked for, a dense solver is quicker than an iteration.
_DENSE = 400
#: Eigenpairs computed beyond those asked for, so that there is a gap to count at.
_SPARE = 6
#: How often missing members of multiple eigenvalues are looked for.
_ROUNDS = 4


def factorise(matrix: sp.csc_matrix) -> Any:
    """Return SuperLU's factorisation of a symmetric or Hermitian positive definite matrix, ordered by minimum degree.

    Without pivoting and with the ordering of the symmetric pattern the factors are about half as full as by default.
    """
    options = {"SymmetricMode": True}
    return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)


def smallest_eigenpairs(pencil: Pencil, k: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the k smallest eigenvalues and fields of :math:`Lu=\lambda Mu`.

    On an oriented surface the rotation of a field by a right angle commutes with the Laplacian, so all
    eigenvalues are double. There the Hermitian form of half the size is solved, both fields of a pair are
    returned, and an odd k is rounded up: a basis of half a pair would depend on the solver.

    Args:
        pencil: The Laplacian and its masses.
        k: The number k of eigenpairs.

    Returns:
        Eigenvalues ``(k,)``, increasing and not negative, and fields ``(n, f, k)`` with
        :math:`\sum_iM_i|u_i|^2=f\sum_iM_i`: entries of mean square one.

    Raises:
        InvalidInputError: If k exceeds the number of unknowns.
    """
    if k > pencil.size:
        raise InvalidInputError(
            "there are not that many eigenpairs",
            got=k,
            expected=f"at most {pencil.size}, {pencil.fibre} per node",
        )
    count = (k + 1) // 2 if pencil.paired else k
    values, vectors = _solve(pencil.symmetric(), count)
    mass = pencil.row_mass()
    # From M^{1/2} u of unit norm to u with Σ_i M_i |u_i|² = f Σ_i M_i.
    vectors = vectors * np.sqrt(pencil.fibre * pencil.mass.sum() / mass)[:, None]
    values = np.maximum(values, 0.0)
    if not pencil.paired:
        return values, pencil.to_fields(vectors)
    # One complex vector of unit norm stands for two real fields, each of the same norm: itself and its rotation by i.
    fields = np.stack([pencil.to_fields(vectors), pencil.to_fields(1j * vectors)], -1)
    return np.repeat(values, 2), fields.reshape(pencil.num_nodes, 2, -1)


def _solve(matrix: sp.csc_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    size = matrix.shape[0]
    if size <= _DENSE or k > size // 3:
        values, vectors = np.linalg.eigh(matrix.toarray())
        return values[:k], vectors[:, :k]
    # A shift just under the spectrum keeps the factorisation regular where fields are parallel (eigenvalue 0).
    shift = -1e-5 * float(abs(matrix.diagonal()).mean())
    solver = factorise((matrix - shift * sp.identity(size, format="csc")).tocsc())
    rng = np.random.default_rng(0)
    values, vectors = _lanczos(matrix, solver, shift, k + _SPARE, None, rng)
    # Symmetric shapes have eigenvalues of any multiplicity, of which an iteration from one vector may miss members.
    # The signs of the pivots say how many there are below a level.
    for _ in range(_ROUNDS):
        level = _level(values, k)
        missing = _count_below(matrix, level) - int((values < level).sum())
        if missing <= 0:
            break
        more, others = _lanczos(matrix, solver, shift, missing + 2, vectors, rng)
        keep = (more < level) if (more < level).any() else slice(None)
        values, vectors = np.concatenate([values, more[keep]]), np.concatenate([vectors, others[:, keep]], 1)
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
    return values[:k], vectors[:, :k]


def _lanczos(
    matrix: sp.csc_matrix,
    solver: Any,
    shift: float,
    k: int,
    known: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return k eigenpairs nearest to the shift, increasing, orthogonal to those that are known."""

    def outside(x: np.ndarray) -> np.ndarray:
        return x if known is None else x - known @ (known.conj().T @ x)

    def inverse(x: np.ndarray) -> np.ndarray:
        return outside(solver.solve(outside(x)))

    operator = LinearOperator(matrix.shape, inverse, dtype=matrix.dtype)
    start = outside(rng.standard_normal(matrix.shape[0]).astype(matrix.dtype))
    values, vectors = eigsh(matrix, k, sigma=shift, OPinv=operator, v0=start)
    order = np.argsort(values)
    return values[order], vectors[:, order]


def _level(values: np.ndarray, k: int) -> float:
    """Return a level above the k-th eigenvalue, in the widest gap that follows."""
    tail = values[k - 1 :]
    widest = int(np.argmax(np.diff(tail)))
    return float(0.5 * (tail[widest] + tail[widest + 1]))


def _count_below(matrix: sp.csc_matrix, level: float) -> int:
    """Count the eigenvalues below a level by Sylvester's law of inertia."""
    pivots = factorise((matrix - level * sp.identity(matrix.shape[0], format="csc")).tocsc()).U.diagonal()
    return int((pivots.real < 0).sum())
