"""Exact propagation of outcome probabilities by the master equation, for small lattices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.products import probabilities_of
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.arguments import as_times, check_frame, check_model
from stochdyn.povm.master.density import check_bound, initial_density
from stochdyn.povm.master.integration import integrate
from stochdyn.povm.master.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from scipy import sparse

    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["initial_probabilities", "propagate", "sparse_generator", "stationary_probabilities"]

_MAX_OUTCOMES = 1 << 20
_MAX_MATRIX = 1 << 15
_MAX_TURNS = 1e6


def check_outcomes(num_outcomes: int, num_sites: int) -> None:
    """Raise unless all outcomes can be listed.

    Raises:
        SystemSizeError: If there are over 2**20.
    """
    if num_outcomes**num_sites > _MAX_OUTCOMES:
        raise SystemSizeError(
            "there are too many outcomes to propagate all probabilities",
            got=f"{num_outcomes}**{num_sites}",
            expected=f"at most {_MAX_OUTCOMES}",
            hint="sample instead: stochdyn.povm.evolve with a network",
        )


def initial_probabilities(povm: Frame | SiteFrames, state: Any, num_sites: int) -> Tensor:
    """Return the probabilities ``(K**N,)`` of all outcomes in a state.

    Args:
        povm: The frame of all sites, or one for each site.
        state: The state, as for :func:`~stochdyn.povm.exact.evolve`.
        num_sites: The number ``N`` of sites.
    """
    check_outcomes(povm.num_outcomes, num_sites)
    rho = initial_density(state, num_sites, povm.dim)
    return probabilities_of(rho, [povm.at(i) for i in range(num_sites)]).clamp(min=0.0)


def sparse_generator(operator: SparseMasterEquation, t: float | None = None) -> sparse.csr_matrix:
    """Return the master operator as a scipy sparse matrix.

    Raises:
        SystemSizeError: If there are too many outcomes.
    """
    from scipy import sparse

    check_outcomes(operator.num_outcomes, operator.num_sites)
    matrix = operator.to_sparse(t).detach()
    rows, columns = matrix.indices().numpy()
    return sparse.csr_matrix((matrix.values().double().numpy(), (rows, columns)), shape=tuple(matrix.shape))


def propagate(
    model: Lindbladian,
    povm: Frame | SiteFrames,
    state: Any,
    ts: Tensor | Sequence[float],
    *,
    rtol: float = 1e-11,
    atol: float = 1e-14,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
) -> Tensor:
    r"""Return the probabilities of all outcomes at all times, from the master equation.

    .. math:: p(t) = e^{Lt}p(0)

    by the action of the matrix exponential, or by a Runge-Kutta method of order eight if coefficients depend on time.

    Args:
        model: The Lindbladian, its parameters bound.
        povm: The frame of all sites, or one for each site.
        state: The initial state, as for :func:`~stochdyn.povm.exact.evolve`, or the probabilities ``(K**N,)`` of all
            outcomes at the first time.
        ts: The output times, increasing, the first being that of the initial state.
        rtol: The relative tolerance of a step, if coefficients depend on time.
        atol: The absolute tolerance of a step.
        max_step: The longest step, if coefficients depend on time, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.

    Returns:
        ``(T, K**N)`` float64, the first site slowest.

    Raises:
        TimeGridError: If the times don't increase.
        SystemSizeError: If there are over 2**20 outcomes (ten qubits).

    Example:
        >>> from stochdyn.povm import Lindbladian, Tetrahedral
        >>> p = propagate(Lindbladian(1, [(1.0, "X", 0)]), Tetrahedral(), "up", [0.0, 0.5])
        >>> p.sum(1)
        tensor([1., 1.], dtype=torch.float64)

    Reference:
        Al-Mohy and Higham, SIAM J. Sci. Comput. 33, 488 (2011).
    """
    check_model(model)
    check_frame(povm)
    grid = as_times(ts)
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_bound(model)
    check_outcomes(povm.num_outcomes, model.num_sites)
    schedule = make_schedule(model, grid, max_step=max_step, breaks=breaks)
    if isinstance(state, Tensor) and state.is_floating_point() and state.ndim == 1:
        if state.shape[0] != povm.num_outcomes**model.num_sites:
            raise ShapeError(
                "there is one probability for each outcome",
                got=state.shape[0],
                expected=povm.num_outcomes**model.num_sites,
            )
        p = state.detach().double().cpu()
    else:
        p = initial_probabilities(povm, state, model.num_sites)
    operator = model.master_operator(povm)
    if model.is_time_dependent:
        return _integrate(operator, p, schedule, rtol, atol)
    from scipy.sparse.linalg import expm_multiply

    matrix = sparse_generator(operator) if operator.num_states <= _MAX_MATRIX else _matrix_free(operator)
    trace = _trace(operator)
    check_length(model, float(grid[-1] - grid[0]))
    values = [p.numpy()]
    for span in (grid[1:] - grid[:-1]).tolist():
        # p(t + s) = exp(L s) p(t), with Tr L known so that the scaling of Al-Mohy and Higham needs no
        # estimate of it
        values.append(expm_multiply(matrix * span, values[-1], traceA=trace * span))
    return torch.from_numpy(np.stack(values))


def _trace(operator: SparseMasterEquation) -> float:
    n, q = operator.num_sites, operator.num_outcomes
    factors = operator.coefficients
    weights = factors.tolist() if isinstance(factors, Tensor) else [1.0] * len(operator.sites)
    return sum(
        weight * float(operator.matrix(i).trace()) * q ** (n - len(sites))
        for i, (sites, weight) in enumerate(zip(operator.sites, weights, strict=True))
    )


def _matrix_free(operator: SparseMasterEquation) -> Any:
    """The operator for scipy, applied term by term: at nine sites its entries alone would take a gigabyte."""
    from scipy.sparse.linalg import LinearOperator

    def by(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def act(x: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(x.reshape(operator.num_states, -1).T))
            return function(columns).detach().numpy().T.reshape(x.shape)

        return act

    forward, adjoint = by(operator.apply), by(operator.apply_adjoint)
    size = (operator.num_states, operator.num_states)
    return LinearOperator(
        size, matvec=forward, matmat=forward, rmatvec=adjoint, rmatmat=adjoint, dtype=np.float64
    )


def check_length(model: Lindbladian, span: float) -> None:
    """Raise if an evolution takes so many periods of the fastest term that it wouldn't end.

    Raises:
        InvalidInputError: If it is over a million.
    """
    turns = model.rate_scale() * span
    if not turns <= _MAX_TURNS:
        raise InvalidInputError(
            "the evolution is too long to be followed",
            got=f"{turns:.2g} times the inverse of the fastest rate",
            expected=f"at most {_MAX_TURNS:g}",
            hint="steady_state finds where it ends",
        )


def _integrate(
    operator: SparseMasterEquation,
    p: Tensor,
    schedule: Schedule,
    rtol: float,
    atol: float,
) -> Tensor:
    def change(t: float, y: np.ndarray) -> np.ndarray:
        return operator.apply(torch.from_numpy(y), t).detach().numpy()

    values: list[Tensor] = []
    integrate(
        change,
        p.numpy(),
        schedule,
        lambda _, y: values.append(torch.from_numpy(y.copy())),
        rtol=rtol,
        atol=atol,
    )
    return torch.stack(values)


def stationary_probabilities(operator: SparseMasterEquation) -> Tensor:
    r"""Return the probabilities ``(K**N,)`` with :math:`Lp=0`, by a dense solve.

    Raises:
        InvalidInputError: If there are several stationary states, or the operator depends on time.
        SystemSizeError: If there are over 4096 outcomes.
    """
    if operator.num_states > 4096:
        raise SystemSizeError(
            "there are too many outcomes for a dense solve", got=operator.num_states, expected=4096
        )
    matrix = operator.to_sparse().to_dense().detach().double().clone()
    matrix /= matrix.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    matrix[0] = 1.0  # rows sum to zero, so one of them is redundant; normalisation takes its place
    right = torch.zeros(operator.num_states, dtype=torch.float64)
    right[0] = 1.0
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    diagonal = lu.diagonal().abs()
    if int(info) or float(diagonal.min()) < 1e-13 * float(diagonal.max()):
        raise InvalidInputError(
            "the steady state isn't unique", hint="add a jump that mixes what the Hamiltonian keeps apart"
        )
    return torch.linalg.lu_solve(lu, pivots, right[:, None])[:, 0]
