"""The Lindblad equation of a whole density matrix: initial states, its right-hand side, its integration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm.frames.operators import as_state
from stochdyn.povm.lindblad.terms import TermCoefficient, coupling_value

if TYPE_CHECKING:
    from scipy import sparse

    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["DensityGenerator", "check_density_size", "full_operator", "initial_density"]

_MAX_ELEMENTS = 1 << 26


def check_density_size(num_sites: int, dim: int) -> None:
    """Raise unless a whole density matrix of so many sites fits a usual memory.

    Raises:
        SystemSizeError: if it has over 2**26 elements (1 GB): 13 qubits.
    """
    if dim ** (2 * num_sites) > _MAX_ELEMENTS:
        raise SystemSizeError(
            "the density matrix is too large for exact methods",
            got=f"{num_sites} sites of {dim} levels",
            expected=f"at most {_MAX_ELEMENTS} matrix elements",
            hint="sample instead: stochdyn.povm.evolve with a network",
        )


def initial_density(state: Any, num_sites: int, dim: int = 2) -> Tensor:
    """Return the density matrix ``(d**N, d**N)`` of a state of the lattice.

    Args:
        state: a name or the state of one site, taken for all sites; a list with one a site; or a vector or density
            matrix of the whole lattice.
        num_sites: ``N``.
        dim: levels of a site.

    Raises:
        InvalidInputError, ShapeError: if it is no state, or doesn't fit.
        SystemSizeError: if the matrix would be too large.
    """
    check_density_size(num_sites, dim)
    if isinstance(state, (list, tuple)) and any(isinstance(s, str) or hasattr(s, "shape") for s in state):
        if len(state) != num_sites:
            raise InvalidInputError(
                "a product state needs one state a site", got=len(state), expected=num_sites
            )
        return reduce(torch.kron, [as_state(s, dim) for s in state])
    rho = as_state(state, dim)
    if rho.shape[0] == dim and num_sites > 1:
        return reduce(torch.kron, [rho] * num_sites)
    if rho.shape[0] != dim**num_sites:
        raise ShapeError(
            "the state doesn't fit the lattice",
            got=rho.shape[0],
            expected=f"{dim} or {dim**num_sites} levels",
        )
    return rho


def full_operator(matrix: Tensor, sites: Sequence[int], num_sites: int, dim: int) -> sparse.csr_matrix:
    """Return an operator on some sites as a sparse matrix ``(d**N, d**N)`` on all."""
    from scipy import sparse

    k = len(sites)
    digits = np.arange(dim**num_sites)
    strides = [dim ** (num_sites - 1 - s) for s in sites]
    local = sum((digits // stride % dim) * dim ** (k - 1 - j) for j, stride in enumerate(strides))
    rest = digits - sum((digits // stride % dim) * stride for stride in strides)
    offsets = sum(
        (np.arange(dim**k) // dim ** (k - 1 - j) % dim) * stride for j, stride in enumerate(strides)
    )
    entries = matrix.resolve_conj().numpy()
    rows, columns, values = [], [], []
    for target in range(dim**k):
        weights = entries[target, local]
        alive = np.nonzero(weights)[0]
        rows.append(rest[alive] + offsets[target])
        columns.append(alive)
        values.append(weights[alive])
    shape = (dim**num_sites, dim**num_sites)
    data = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(data, shape=shape)


class DensityGenerator:
    r"""The right-hand side of the Lindblad equation in matrix form, with sparse operators.

    .. math::
        \dot\rho = K\rho + (K\rho)^\dagger + \sum_k\gamma_k\,c_k\rho c_k^\dagger,\qquad
        K = -iH - \tfrac12\sum_k\gamma_k\,c_k^\dagger c_k

    Args:
        model: its parameters bound.

    Raises:
        SystemSizeError: if the density matrix would be too large.
    """

    def __init__(self, model: Lindbladian) -> None:
        check_density_size(model.num_sites, model.dim)
        self.size = model.dim**model.num_sites
        self._drifts: list[tuple[TermCoefficient, Any]] = []
        self._jumps: list[tuple[TermCoefficient, Any]] = []
        drifts: dict[Any, tuple[TermCoefficient, Any]] = {}

        def add(coupling: TermCoefficient, operator: Any) -> None:
            shared = TermCoefficient(1.0, coupling.function, coupling.parameter, coupling.value)
            total = drifts[coupling.key][1] + operator if coupling.key in drifts else operator
            drifts[coupling.key] = (shared, total)

        for term in model.hamiltonian:
            h = full_operator(term.matrix, term.sites, model.num_sites, model.dim)
            add(term.coupling, -1j * term.coupling.factor * h)
        for term in model.jumps:
            c = full_operator(term.matrix, term.sites, model.num_sites, model.dim)
            add(term.coupling, -0.5 * term.coupling.factor * (c.conj().T @ c))
            self._jumps.append((term.coupling, c))
        self._drifts = [(coupling, operator.tocsr()) for coupling, operator in drifts.values()]

    def __call__(self, t: float, rho: np.ndarray) -> np.ndarray:
        """Return the rate of change of a Hermitian matrix."""
        flow = np.zeros_like(rho)
        for coupling, operator in self._drifts:
            flow += coupling_value(coupling, t) * (operator @ rho)
        for coupling, c in self._jumps:
            # half of a Hermitian term, so that adding the adjoint below completes it
            flow += (0.5 * coupling_value(coupling, t)) * (c @ (c @ rho).conj().T)
        return flow + flow.conj().T

    def integrate(
        self,
        rho: Tensor,
        times: Sequence[float],
        visit: Callable[[int, Tensor], None],
        rtol: float = 1e-11,
        atol: float = 1e-13,
    ) -> None:
        """Integrate by an explicit Runge-Kutta method of order eight, and visit the state at every time.

        Args:
            rho: ``(D, D)`` at the first time.
            times: increasing.
            visit: called with the number of a time and the state then.
            rtol: relative tolerance.
            atol: absolute tolerance.
        """
        from scipy.integrate import DOP853

        size = self.size

        def change(t: float, y: np.ndarray) -> np.ndarray:
            return self(t, y.reshape(size, size)).reshape(-1)

        start = rho.resolve_conj().numpy().reshape(-1)
        visit(0, rho)
        if len(times) == 1:
            return
        solver = DOP853(change, times[0], start, times[-1], rtol=rtol, atol=atol)
        place = 1
        while place < len(times):
            message = solver.step()
            if solver.status == "failed":
                raise InvalidInputError(
                    "the integration failed", got=message, hint="are coefficients finite?"
                )
            dense = None
            while place < len(times) and solver.t >= times[place]:
                if solver.t == times[place]:
                    y = solver.y
                else:
                    dense = dense or solver.dense_output()
                    y = dense(times[place])
                visit(place, torch.from_numpy(np.array(y).reshape(size, size)))
                place += 1
