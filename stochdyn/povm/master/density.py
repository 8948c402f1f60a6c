"""The Lindblad equation of a whole density matrix: initial states, its right-hand side, its integration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import LindbladianError, ShapeError, SystemSizeError
from stochdyn.povm.frames.embedding import full_operator
from stochdyn.povm.frames.operators import as_state
from stochdyn.povm.frames.products import is_listing, site_states
from stochdyn.povm.lindblad.coefficients import Coefficient, coefficient_value
from stochdyn.povm.lindblad.lindbladian import check_rate
from stochdyn.povm.master.integration import integrate
from stochdyn.povm.master.schedule import Schedule

if TYPE_CHECKING:
    from scipy import sparse

    from stochdyn.povm.lindblad.lindbladian import Lindbladian
    from stochdyn.povm.lindblad.terms import CollectiveJump, Term

__all__ = [
    "DensityGenerator",
    "check_bound",
    "check_density_size",
    "flow_parts",
    "full_operator",
    "initial_density",
    "whole_operator",
]

_MAX_ELEMENTS = 1 << 26
FlowPart = tuple[Coefficient, Any]
JumpPart = tuple[Coefficient, Any, tuple[int, ...]]


def check_density_size(num_sites: int, dim: int) -> None:
    """Raise unless a whole density matrix of so many sites fits a usual memory.

    Raises:
        SystemSizeError: If it has over 2**26 elements (1 GB): 13 qubits.
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
        state: The state: a name or the state of one site, taken for all sites; a list with one for each site; or a
            vector or density matrix of the whole lattice.
        num_sites: The number ``N`` of sites.
        dim: The number of levels of a site.

    Raises:
        InvalidInputError, ShapeError: If it is no state, or doesn't fit.
        SystemSizeError: If the matrix would be too large.
    """
    check_density_size(num_sites, dim)
    if is_listing(state):
        return reduce(torch.kron, [as_state(s, dim) for s in site_states(state, num_sites)])
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


def flow_parts(model: Lindbladian) -> tuple[list[FlowPart], list[JumpPart]]:
    r"""Return the operators by which state vectors flow between jumps, and those of the jumps.

    .. math:: K = -iH - \tfrac12\sum_k\gamma_k\,c_k^\dagger c_k = \sum_gf_g(t)\,K_g

    Args:
        model: The Lindbladian, its parameters bound.

    Returns:
        Pairs of a function of time and a sparse matrix :math:`K_g`, one for each distinct function; and rate, sparse
        matrix and sites of each jump.
    """
    n, d = model.num_sites, model.dim
    flow: dict[Any, FlowPart] = {}

    def add(coupling: Coefficient, operator: Any) -> None:
        total = flow[coupling.key][1] + operator if coupling.key in flow else operator
        flow[coupling.key] = (replace(coupling, factor=1.0), total)

    for term in model.hamiltonian:
        add(term.coupling, -1j * term.coupling.factor * full_operator(term.matrix, term.sites, n, d))
    jumps: list[JumpPart] = []
    for jump in model.jumps:
        c = whole_operator(jump, n, d)
        add(jump.coupling, -0.5 * jump.coupling.factor * (c.conj().T @ c))
        jumps.append((jump.coupling, c, jump.sites))
    return [(coupling, operator.tocsr()) for coupling, operator in flow.values()], jumps


class DensityGenerator:
    r"""The right-hand side of the Lindblad equation in matrix form, with sparse operators.

    .. math::
        \dot\rho = K\rho + (K\rho)^\dagger + \sum_k\gamma_k\,c_k\rho c_k^\dagger,\qquad
        K = -iH - \tfrac12\sum_k\gamma_k\,c_k^\dagger c_k

    Args:
        model: The Lindbladian, its parameters bound.

    Raises:
        SystemSizeError: If the density matrix would be too large.
        LindbladianError: If parameters aren't bound.
    """

    def __init__(self, model: Lindbladian) -> None:
        check_density_size(model.num_sites, model.dim)
        check_bound(model)
        self.size = model.dim**model.num_sites
        self._drifts, self._jumps = flow_parts(model)

    def __call__(self, t: float, rho: np.ndarray) -> np.ndarray:
        """Return the rate of change of a Hermitian matrix.

        Raises:
            LindbladianError: If a rate that depends on time is negative.
        """
        # K rho + (K rho)^dagger + sum_k gamma_k c_k rho c_k^dagger
        flow = np.zeros_like(rho)
        for coupling, operator in self._drifts:
            flow += coefficient_value(coupling, t) * (operator @ rho)
        for coupling, c, sites in self._jumps:
            rate = coefficient_value(coupling, t)
            if coupling.uses_time:
                check_rate(rate, t, sites)
            # half of a Hermitian term, so that adding the adjoint below completes it
            flow += (0.5 * rate) * (c @ (c @ rho).conj().T)
        return flow + flow.conj().T

    def integrate(
        self,
        rho: Tensor,
        schedule: Schedule,
        visit: Callable[[int, Tensor], None],
        rtol: float = 1e-11,
        atol: float = 1e-13,
    ) -> None:
        """Integrate and visit the density matrix at every output time; see :func:`~stochdyn.povm.master.integration.integrate`."""
        size = self.size

        def change(t: float, y: np.ndarray) -> np.ndarray:
            return self(t, y.reshape(size, size)).reshape(-1)

        def look(index: int, y: np.ndarray) -> None:
            visit(index, torch.from_numpy(np.array(y).reshape(size, size)))

        start = rho.resolve_conj().numpy().reshape(-1)
        integrate(change, start, schedule, look, rtol=rtol, atol=atol)


def whole_operator(jump: Term | CollectiveJump, num_sites: int, dim: int) -> sparse.csr_matrix:
    """Return the operator of a jump, or of a term, on the whole lattice."""
    parts = [full_operator(matrix, sites, num_sites, dim) for matrix, sites in jump.parts]
    return sum(parts[1:], parts[0])


def check_bound(model: Lindbladian) -> None:
    """Raise unless all parameters of a model are set.

    Raises:
        LindbladianError: If a parameter isn't set; the message names them.
    """
    if model.parameters:
        raise LindbladianError(
            "parameters must be bound first", got=", ".join(model.parameters), hint="model.bind(name=value)"
        )
