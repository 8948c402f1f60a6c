"""Lindbladians from QuTiP operators, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stochdyn.errors import LindbladianError

if TYPE_CHECKING:
    from stochdyn.povm.lindblad import Lindbladian

__all__ = ["from_qutip"]


def from_qutip(terms: Iterable[Any], jumps: Iterable[Any] = (), num_sites: int | None = None) -> Lindbladian:
    """Return a Lindbladian from QuTiP operators on single sites or few of them.

    Args:
        terms: Hamiltonian terms ``(coefficient, Qobj or list of Qobj, sites)``, a list having one operator a site.
        jumps: the same with rates for coefficients; the jump operator itself doesn't carry the root of its rate.
        num_sites: by default one more than the largest site named.

    Raises:
        LindbladianError: as for :class:`stochdyn.povm.Lindbladian`; or if operators differ in their levels.

    Example:
        >>> import pytest
        >>> qutip = pytest.importorskip("qutip")
        >>> model = from_qutip(
        ...     [(0.5, [qutip.sigmaz(), qutip.sigmaz()], (0, 1)), (1.0, qutip.sigmax(), 0)],
        ...     [(1.0, qutip.sigmam(), 0)],
        ... )
        >>> model.num_sites
        2
    """
    from stochdyn.povm.lindblad import Lindbladian

    terms, jumps = list(terms), list(jumps)
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


def _levels(operator: Any) -> set[int]:
    dims = getattr(operator, "dims", None)
    if dims is None:
        raise LindbladianError("an operator must be a Qobj", got=type(operator).__name__)
    if dims[0] != dims[1] or not all(isinstance(d, int) for d in dims[0]):
        raise LindbladianError("a Qobj must be an operator", got=f"dims {dims}")
    return set(dims[0])
