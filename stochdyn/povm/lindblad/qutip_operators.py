"""Lindbladians from QuTiP operators, and back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.errors import LindbladianError, MissingDependencyError
from stochdyn.povm.lindblad.coefficients import Coefficient, coefficient_value
from stochdyn.povm.lindblad.lindbladian import check_rate
from stochdyn.povm.lindblad.pauli import MAX_SUPPORT, local_parts, touched_sites
from stochdyn.povm.lindblad.terms import CollectiveJump, Term
from stochdyn.povm.master.density import check_bound, check_density_size, full_operator, whole_operator
from stochdyn.povm.master.schedule import Schedule, Segment

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["from_qutip", "to_qutip"]

_PLACES = tuple(i / 16 for i in range(16))


def from_qutip(terms: Any, jumps: Any = (), num_sites: int | None = None) -> Lindbladian:
    """Return a Lindbladian from QuTiP operators: local terms, or what ``qutip.mesolve`` takes.

    Args:
        terms: The Hamiltonian: terms ``(coefficient, Qobj or list of Qobj, sites)``, a list having one operator for
            each site; or an operator of the whole lattice (up to 1024 levels), which is taken apart into local terms: a
            ``Qobj``, a ``QobjEvo``, or QuTiP's list ``[H0, [H1, f], ...]`` with functions of time or strings.
        jumps: The jumps: terms with rates for coefficients, where the operator doesn't carry the root of its rate; or
            collapse operators of the whole lattice, which do, as ``Qobj``, ``QobjEvo`` or ``[c, f]``.
        num_sites: The number of sites; one more than the largest site named if None.

    Raises:
        LindbladianError: As for :class:`~stochdyn.povm.lindblad.lindbladian.Lindbladian`; if operators differ in their
            levels; or if a part of a Hamiltonian acts on over five sites, or a jump on many isn't a sum of local ones.

    Example:
        >>> import pytest
        >>> qutip = pytest.importorskip("qutip")
        >>> model = from_qutip(
        ...     [(0.5, [qutip.sigmaz(), qutip.sigmaz()], (0, 1)), (1.0, qutip.sigmax(), 0)],
        ...     [(1.0, qutip.sigmam(), 0)],
        ... )
        >>> zz = qutip.tensor(qutip.sigmaz(), qutip.sigmaz())
        >>> x = qutip.tensor(qutip.sigmax(), qutip.qeye(2))
        >>> whole = from_qutip([0.5 * zz, [x, lambda t: t]], [qutip.tensor(qutip.sigmam(), qutip.qeye(2))])
        >>> model.num_sites, whole.bonds, whole.is_time_dependent
        (2, [(0, 1)], True)
    """
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

    jumps = [jumps] if _is_whole(jumps) else list(jumps)
    if _is_whole(terms) or (not isinstance(terms, list | tuple) and hasattr(terms, "dims")):
        return _from_whole(terms, jumps, num_sites)
    if not isinstance(terms, list | tuple):
        raise LindbladianError("the Hamiltonian must be a Qobj or a list of terms", got=type(terms).__name__)
    if any(_is_operator(e) or isinstance(e, list) for e in terms) or any(map(_is_whole, jumps)):
        return _from_whole(terms, jumps, num_sites)
    terms = list(terms)
    levels: set[int] = set()
    highest = 0
    for entry in [*terms, *jumps]:
        if not isinstance(entry, Sequence) or len(entry) != 3:
            raise LindbladianError("a term must be (coefficient, operator, sites)", got=repr(entry)[:80])
        operators = entry[1] if isinstance(entry[1], list | tuple) else [entry[1]]
        for operator in operators:
            levels |= set(_levels(operator))
        if isinstance(entry[2], str):
            continue
        places = entry[2] if isinstance(entry[2], list) else [entry[2]]
        for place in places:
            one = place.tolist() if hasattr(place, "tolist") else place
            numbers = one if isinstance(one, tuple | list) else (one,)
            if not all(hasattr(site, "__index__") for site in numbers):
                raise LindbladianError("sites must be integers", got=repr(place)[:60])
            highest = max(highest, *numbers)
    if len(levels) > 1:
        raise LindbladianError("all sites need the same number of levels", got=sorted(levels))
    if num_sites is None:
        num_sites = highest + 1
    return Lindbladian(num_sites, terms, jumps, dim=levels.pop() if levels else 2)


def _is_operator(value: Any) -> bool:
    return hasattr(value, "dims") and callable(getattr(value, "full", None))


def _is_evolving(value: Any) -> bool:
    return hasattr(value, "dims") and callable(getattr(value, "to_list", None)) and callable(value)


def _is_whole(value: Any) -> bool:
    """Whether a value is an operator of the whole lattice as QuTiP's solvers take it."""
    return _is_operator(value) or _is_evolving(value)


def _pieces(value: Any, name: str) -> list[tuple[Any, Any]]:
    """Return pairs of a coefficient and a ``Qobj`` whose sum an operator of QuTiP's solvers is."""
    if _is_evolving(value) and not _is_operator(value):
        return [pair for entry in value.to_list() for pair in _pieces(entry, name)]
    if _is_operator(value):
        return [(1.0, value)]
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and _is_operator(value[0])
        and not _is_listed(value[1])
    ):
        return [(_coefficient(value[1], name), value[0])]
    if isinstance(value, list) and value:
        return [pair for entry in value for pair in _pieces(entry, name)]
    raise LindbladianError(
        f"{name} must be Qobj of the whole lattice",
        got=repr(value)[:60],
        expected="a Qobj, a QobjEvo, or [Qobj, function of time]",
        hint="local terms are (coefficient, operator, sites), for Hamiltonian and jumps alike",
    )


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple) or _is_whole(value)


def _coefficient(value: Any, name: str) -> Any:
    """Return a coefficient of QuTiP as one of ours; its objects are called with the time alone."""
    if isinstance(value, int | float | str):
        return value
    if type(value).__module__.startswith("qutip"):

        def of_qutip(t: Any) -> float:
            return complex(value(float(t))).real

        return of_qutip
    if callable(value):
        try:
            extra = "args" in inspect.signature(value).parameters
        except (TypeError, ValueError):
            extra = False
        if extra:

            def without_args(t: Any) -> Any:
                return value(t, {})

            return without_args
        return value
    raise LindbladianError(
        f"a coefficient of {name} can't be read",
        got=type(value).__name__,
        expected="a number, a function of time, a string, or a coefficient of QuTiP",
        hint="sampled values go in as stochdyn.povm.SampledCoefficient(times, values)",
    )


def _from_whole(hamiltonian: Any, collapse: list[Any], num_sites: int | None) -> Lindbladian:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

    parts = _pieces(hamiltonian, "Hamiltonian and collapse operators")
    jumps_given = [_pieces(c, "Hamiltonian and collapse operators") for c in collapse]
    every = [q for _, q in parts] + [q for pieces in jumps_given for _, q in pieces]
    levels = _levels(every[0])
    n, dim = len(levels), levels[0]
    if len(set(levels)) > 1:
        raise LindbladianError("all sites need the same number of levels", got=f"dims {every[0].dims}")
    if num_sites not in (None, n) or any(_levels(q) != levels for q in every):
        raise LindbladianError("operators are of lattices of different size", got=n, expected=num_sites)
    terms: list[Any] = []
    for coefficient, q in parts:
        h = torch.as_tensor(q.full())
        terms += [
            (coefficient, matrix, sites) for sites, matrix in local_parts(h, "the Hamiltonian", dim=dim)
        ]
    jumps = []
    for place, pieces in enumerate(jumps_given):
        name = f"collapse operator {place}"
        if len(pieces) > 1:
            raise LindbladianError(
                f"{name} is a sum of terms with coefficients of their own",
                hint="give one operator with one function of time, [c, f]",
            )
        ((coefficient, q),) = pieces
        every_site = tuple(range(n))
        matrix = torch.as_tensor(q.full())
        touched = touched_sites(matrix, dim)
        if len(touched) <= MAX_SUPPORT:
            ((touched, matrix),) = local_parts(matrix, name, together=True, dim=dim)
            jumps.append((_squared(coefficient), matrix, touched))
        else:
            jumps.append((_squared(coefficient), matrix, every_site))
    return Lindbladian(n, terms, jumps, dim=dim)


def _squared(coefficient: Any) -> Any:
    """Return the rate of a collapse operator from what multiplies it."""
    if isinstance(coefficient, str):
        return f"({coefficient})**2"
    if callable(coefficient):

        def rate(t: Any) -> Any:
            return abs(coefficient(t)) ** 2

        return rate
    return abs(coefficient) ** 2


def _levels(operator: Any) -> list[int]:
    dims = getattr(operator, "dims", None)
    if dims is None:
        raise LindbladianError("an operator must be a Qobj", got=type(operator).__name__)
    if dims[0] != dims[1] or not all(isinstance(d, int) for d in dims[0]):
        raise LindbladianError("a Qobj must be an operator", got=f"dims {dims}")
    return list(dims[0])


def to_qutip(model: Lindbladian) -> tuple[Any, list[Any]]:
    """Return Hamiltonian and collapse operators of the whole lattice, as QuTiP's solvers take them.

    Args:
        model: The Lindbladian, its parameters bound. Coefficients that depend on time make a ``QobjEvo``.

    Returns:
        ``(H, c_ops)``; a collapse operator carries the root of its rate.

    Raises:
        SystemSizeError: If the operators would be too large.
        MissingDependencyError: If QuTiP isn't installed.

    Example:
        >>> import pytest
        >>> qutip = pytest.importorskip("qutip")
        >>> from stochdyn.povm import systems
        >>> h, c_ops = to_qutip(systems.ising(2))
        >>> h.shape, len(c_ops)
        ((4, 4), 2)
    """
    from stochdyn.povm.master.arguments import check_model

    check_model(model)
    return _operators(model, 1.0, lambda t: t)


def require_qutip() -> Any:
    """Return QuTiP.

    Raises:
        MissingDependencyError: If it isn't installed.
    """
    try:
        import qutip
    except ImportError as error:
        raise MissingDependencyError(
            "QuTiP isn't installed", hint="pip install 'stochdyn[quantum]'"
        ) from error
    return qutip


def _operators(model: Lindbladian, unit: float, time: Callable[[float], float]) -> tuple[Any, list[Any]]:
    """Return the operators with rates times a unit, coefficients being evaluated at ``time(s)``."""
    qutip = require_qutip()
    n, d = model.num_sites, model.dim
    check_density_size(n, d)
    check_bound(model)
    dims = [[d] * n, [d] * n]

    def moving(operator: Any, coupling: Coefficient, root: bool) -> list[Any]:
        def value(s: float) -> float:
            t = time(s)
            number = coefficient_value(coupling, t)
            if root:
                check_rate(number, t, ())
            return math.sqrt(unit * number) if root else unit * number

        return [operator, value]

    def whole(term: Term | CollectiveJump) -> Any:
        return qutip.Qobj(whole_operator(term, n, d), dims=dims)

    constant = qutip.Qobj(full_operator(torch.zeros(d, d, dtype=torch.complex128), (0,), n, d), dims=dims)
    driven = []
    for term in model.hamiltonian:
        if term.coupling.uses_time:
            driven.append(moving(whole(term), term.coupling, False))
        else:
            constant = constant + unit * coefficient_value(term.coupling, 0.0) * whole(term)
    h = qutip.QobjEvo([constant, *driven]) if driven else constant
    collapse = []
    for jump in model.jumps:
        if jump.coupling.uses_time:
            collapse.append(qutip.QobjEvo([moving(whole(jump), jump.coupling, True)]))
        else:
            collapse.append(math.sqrt(unit * coefficient_value(jump.coupling, 0.0)) * whole(jump))
    return h, collapse


def integrate(
    model: Lindbladian,
    rho: Tensor,
    schedule: Schedule,
    visit: Callable[[int, Tensor], None],
    rtol: float,
    atol: float,
) -> None:
    """Integrate by ``qutip.mesolve``, segment by segment, and visit the density matrix at every output time.

    Time is measured in units of the whole span, since QuTiP's integrators have an absolute first step.
    """
    qutip = require_qutip()
    n, d = model.num_sites, model.dim
    visit(0, rho)
    first, span = schedule.ts[0], schedule.span
    where: list[Segment] = []

    def time(s: float) -> float:
        return min(max(first + s * span, where[-1].start), where[-1].end)

    state = qutip.Qobj(rho.resolve_conj().numpy(), dims=[[d] * n, [d] * n])
    options: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "method": "dop853",
        "nsteps": 1_000_000,
        "store_states": False,
        "store_final_state": True,
        "progress_bar": "",
    }
    if n >= 7 and not model.is_time_dependent and tuple(map(int, qutip.__version__.split(".")[:2])) >= (5, 3):
        options["matrix_form"] = True
    if schedule.segments:
        where.append(schedule.segments[0])
        h, collapse = _operators(model, span, time)
    for segment in schedule.segments:
        where.append(segment)
        begin, end = (segment.start - first) / span, (segment.end - first) / span
        if end > begin:
            longest = min(
                schedule.longest(segment.start + x * (segment.end - segment.start)) for x in _PLACES
            )
            if math.isfinite(longest):
                options["max_step"] = longest / span
            state = qutip.mesolve(h, state, [begin, end], collapse, options=options).final_state
        if segment.output is not None:
            visit(segment.output, torch.from_numpy(np.ascontiguousarray(state.full())))
