"""Lindbladians from QuTiP operators, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import LindbladianError, MissingDependencyError
from stochdyn.povm.lindblad.pauli import local_parts
from stochdyn.povm.lindblad.terms import Term, TermCoefficient, coupling_value
from stochdyn.povm.master.density import check_density_size, full_operator

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["from_qutip", "to_qutip"]


def from_qutip(terms: Any, jumps: Iterable[Any] = (), num_sites: int | None = None) -> Lindbladian:
    """Return a Lindbladian from QuTiP operators: local terms, or what ``qutip.mesolve`` takes.

    Args:
        terms: Hamiltonian terms ``(coefficient, Qobj or list of Qobj, sites)``, a list having one operator a site; or
            the Hamiltonian of the whole lattice, a ``Qobj`` of up to ten qubits, which is taken apart into local terms.
        jumps: the same with rates for coefficients, where the operator doesn't carry the root of its rate; or collapse
            operators of the whole lattice, which do.
        num_sites: by default one more than the largest site named.

    Raises:
        LindbladianError: as for :class:`~stochdyn.povm.lindblad.lindbladian.Lindbladian`; if operators differ in their levels; or if a part of a
            whole-lattice operator acts on over five sites.

    Example:
        >>> import pytest
        >>> qutip = pytest.importorskip("qutip")
        >>> model = from_qutip(
        ...     [(0.5, [qutip.sigmaz(), qutip.sigmaz()], (0, 1)), (1.0, qutip.sigmax(), 0)],
        ...     [(1.0, qutip.sigmam(), 0)],
        ... )
        >>> zz = qutip.tensor(qutip.sigmaz(), qutip.sigmaz())
        >>> x = qutip.tensor(qutip.sigmax(), qutip.qeye(2))
        >>> whole = from_qutip(0.5 * zz + x, [qutip.tensor(qutip.sigmam(), qutip.qeye(2))])
        >>> model.num_sites, whole.bonds
        (2, [(0, 1)])
    """
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

    jumps = [jumps] if _is_operator(jumps) else list(jumps)
    if _is_operator(terms) or (not isinstance(terms, (list, tuple)) and hasattr(terms, "dims")):
        return _from_whole(terms, jumps, num_sites)
    terms = list(terms)
    levels: set[int] = set()
    highest = 0
    for entry in [*terms, *jumps]:
        if not isinstance(entry, Sequence) or len(entry) != 3:
            raise LindbladianError("a term must be (coefficient, operator, sites)", got=repr(entry)[:80])
        operators = entry[1] if isinstance(entry[1], (list, tuple)) else [entry[1]]
        for operator in operators:
            levels |= _levels(operator)
        if isinstance(entry[2], str):
            continue
        places = entry[2] if isinstance(entry[2], list) else [entry[2]]
        for place in places:
            highest = max(highest, *(place if isinstance(place, (tuple, list)) else (place,)))
    if len(levels) > 1:
        raise LindbladianError("all sites need the same number of levels", got=sorted(levels))
    if num_sites is None:
        num_sites = highest + 1
    return Lindbladian(num_sites, terms, jumps, dim=levels.pop() if levels else 2)


def _is_operator(value: Any) -> bool:
    return hasattr(value, "dims") and callable(getattr(value, "full", None))


def _from_whole(hamiltonian: Any, collapse: list[Any], num_sites: int | None) -> Lindbladian:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

    for operator in (hamiltonian, *collapse):
        if not _is_operator(operator):
            raise LindbladianError(
                "Hamiltonian and collapse operators of the whole lattice must be Qobj",
                got=type(operator).__name__,
                hint="operators that depend on time go in as local terms with functions for coefficients",
            )
        if _levels(operator) != {2}:
            raise LindbladianError(
                "operators of the whole lattice must be of qubits", got=f"dims {operator.dims}"
            )
    n = len(hamiltonian.dims[0])
    if num_sites not in (None, n) or any(len(c.dims[0]) != n for c in collapse):
        raise LindbladianError("operators are of lattices of different size", got=n, expected=num_sites)
    h = torch.as_tensor(hamiltonian.full())
    terms = [(1.0, matrix, sites) for sites, matrix in local_parts(h, "the Hamiltonian")]
    jumps = []
    for place, c in enumerate(collapse):
        ((sites, matrix),) = local_parts(
            torch.as_tensor(c.full()), f"collapse operator {place}", together=True
        )
        jumps.append((1.0, matrix, sites))
    return Lindbladian(n, terms, jumps)


def _levels(operator: Any) -> set[int]:
    dims = getattr(operator, "dims", None)
    if dims is None:
        raise LindbladianError("an operator must be a Qobj", got=type(operator).__name__)
    if dims[0] != dims[1] or not all(isinstance(d, int) for d in dims[0]):
        raise LindbladianError("a Qobj must be an operator", got=f"dims {dims}")
    return set(dims[0])


def to_qutip(model: Lindbladian) -> tuple[Any, list[Any]]:
    """Return Hamiltonian and collapse operators of the whole lattice, as QuTiP's solvers take them.

    Args:
        model: its parameters bound. Coefficients that depend on time make a ``QobjEvo``.

    Returns:
        ``(H, c_ops)``; a collapse operator carries the root of its rate.

    Raises:
        SystemSizeError: if the operators would be too large.
        MissingDependencyError: if QuTiP isn't installed.
    """
    try:
        import qutip
    except ImportError as error:
        raise MissingDependencyError(
            "QuTiP isn't installed", hint="pip install 'stochdyn[quantum]'"
        ) from error
    n, d = model.num_sites, model.dim
    check_density_size(n, d)
    dims = [[d] * n, [d] * n]

    def whole(term: Term) -> Any:
        return qutip.Qobj(full_operator(term.matrix, term.sites, n, d), dims=dims)

    constant = qutip.Qobj(full_operator(torch.zeros(d, d, dtype=torch.complex128), (0,), n, d), dims=dims)
    moving = []
    for term in model.hamiltonian:
        if term.coupling.function is None:
            constant = constant + coupling_value(term.coupling, 0.0) * whole(term)
        else:
            moving.append([whole(term), _coefficient(term.coupling)])
    h = qutip.QobjEvo([constant, *moving]) if moving else constant
    collapse = []
    for term in model.jumps:
        if term.coupling.function is None:
            collapse.append(math.sqrt(coupling_value(term.coupling, 0.0)) * whole(term))
        else:
            collapse.append(qutip.QobjEvo([[whole(term), _coefficient(term.coupling, root=True)]]))
    return h, collapse


def _coefficient(coupling: TermCoefficient, root: bool = False) -> Callable[[float], float]:
    """Return a coefficient as QuTiP calls it; of a jump, the root of its rate."""

    def value(t: float) -> float:
        number = coupling_value(coupling, t)
        return math.sqrt(number) if root else number

    return value


def integrate(
    model: Lindbladian,
    rho: Tensor,
    times: Sequence[float],
    visit: Callable[[int, Tensor], None],
    rtol: float,
    atol: float,
) -> None:
    """Integrate by ``qutip.mesolve`` and visit the density matrix at every time."""
    import qutip

    h, collapse = to_qutip(model)
    n, d = model.num_sites, model.dim
    start = qutip.Qobj(rho.resolve_conj().numpy(), dims=[[d] * n, [d] * n])
    options: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "method": "dop853",
        "nsteps": 1_000_000,
        "store_states": False,
        "progress_bar": "",
    }
    if n >= 7 and not model.is_time_dependent and tuple(map(int, qutip.__version__.split(".")[:2])) >= (5, 3):
        options["matrix_form"] = True
    place = 0

    def look(t: float, state: Any) -> float:
        nonlocal place
        visit(place, torch.from_numpy(np.ascontiguousarray(state.full())))
        place += 1
        return 0.0

    if len(times) == 1:
        visit(0, rho)
        return
    qutip.mesolve(h, start, list(times), collapse, e_ops=[look], options=options)
