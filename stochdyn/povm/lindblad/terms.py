"""Terms of a Lindbladian as users write them, checked and turned into matrices on their sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.errors import LindbladianError
from stochdyn.povm.frames.operators import as_operator

__all__ = ["Term", "TermCoefficient", "coupling_value", "parse_terms"]

_NAMED = re.compile(r"\s*(?:([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*\*\s*)?([A-Za-z_]\w*)\s*")


@dataclass(frozen=True)
class TermCoefficient:
    """The coefficient of a term, ``factor * function(t) * parameter``; what is None is left out.

    Attributes:
        factor: a number.
        function: of time.
        parameter: name of a parameter whose value comes later.
        value: a tensor ``()`` that stays differentiable.
    """

    factor: float = 1.0
    function: Callable[[Any], Any] | None = None
    parameter: str | None = None
    value: Tensor | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the coefficient is a plain number."""
        return self.function is None and self.parameter is None and self.value is None

    @property
    def key(self) -> tuple[int | None, str | None, int | None]:
        """What two couplings share if they differ by their factors only."""
        return (
            None if self.function is None else id(self.function),
            self.parameter,
            None if self.value is None else id(self.value),
        )


@dataclass(frozen=True)
class Term:
    """One term: a coefficient, a matrix and the sites on which it acts.

    Attributes:
        coupling: the coefficient; of a jump, its rate.
        matrix: ``(d**k, d**k)`` complex128, the first of the sites slowest.
        sites: ``k`` different sites.
    """

    coupling: TermCoefficient
    matrix: Tensor
    sites: tuple[int, ...]


def coupling_value(coupling: TermCoefficient, t: float) -> float:
    """Return the coefficient of a term at a time.

    Raises:
        LindbladianError: if a parameter isn't bound.
    """
    if coupling.parameter is not None:
        raise LindbladianError(
            "parameters must be bound first", got=coupling.parameter, hint="model.bind(name=value)"
        )
    value = coupling.factor
    if coupling.function is not None:
        value *= float(coupling.function(torch.tensor(t, dtype=torch.float64)))
    if coupling.value is not None:
        value *= float(coupling.value.detach())
    return value


def parse_terms(terms: Iterable[Any], num_sites: int, dim: int, kind: str) -> list[Term]:
    """Return the terms of a list of ``(coefficient, operator, sites)``.

    Args:
        terms: see :class:`~stochdyn.povm.lindblad.lindbladian.Lindbladian`.
        num_sites: of the lattice.
        dim: levels of a site.
        kind: ``"hamiltonian"`` or ``"jump"``.

    Raises:
        LindbladianError: if a term isn't Hermitian (``"hamiltonian"``), a rate is negative (``"jump"``), or sites
            repeat or don't exist.
    """
    parsed: list[Term] = []
    for place, entry in enumerate(terms):
        name = f"{kind} term {place}"
        if isinstance(entry, (str, Tensor)) or not isinstance(entry, Sequence) or len(entry) != 3:
            raise LindbladianError(
                f"{name} must be (coefficient, operator, sites)",
                got=repr(entry)[:80],
                expected="three entries",
            )
        coefficient, operator, sites = entry
        groups = _site_groups(sites, num_sites, name)
        if not groups:  # an empty list of bonds, say
            continue
        matrix = as_operator(operator, dim, len(groups[0]), f"the operator of {name}")
        if kind == "hamiltonian":
            _check_hermitian(matrix, name)
        for coupling, group in zip(_couplings(coefficient, len(groups), name), groups, strict=True):
            if kind == "jump" and values_are_checked() and coupling.factor < 0:
                raise LindbladianError(
                    f"the rate of {name} is negative",
                    got=f"{coupling.factor:g}",
                    expected="at least 0",
                    hint="a rate multiplies the dissipator, so the jump operator carries its square root",
                )
            if not coupling.is_constant or coupling.factor != 0:
                parsed.append(Term(coupling, matrix, group))
    return parsed


def _site_groups(sites: Any, num_sites: int, name: str) -> list[tuple[int, ...]]:
    """A tuple or a number is one place, a list many, ``"all"`` every site."""
    if isinstance(sites, str) and sites == "all":
        groups: list[Any] = [(i,) for i in range(num_sites)]
    elif isinstance(sites, list):
        groups = sites
    else:
        groups = [sites]
    if not groups:
        return []
    out: list[tuple[int, ...]] = []
    for group in groups:
        where = tuple(group) if isinstance(group, (tuple, list)) else (group,)
        if any(isinstance(s, bool) or not hasattr(s, "__index__") for s in where):
            raise LindbladianError(f"the sites of {name} must be integers", got=repr(group))
        where = tuple(s.__index__() for s in where)
        if not where or min(where) < 0 or max(where) >= num_sites:
            raise LindbladianError(
                f"{name} acts on a site that doesn't exist", got=where, expected=f"sites 0 to {num_sites - 1}"
            )
        if len(set(where)) != len(where):
            raise LindbladianError(f"{name} names a site twice", got=where)
        if len(where) != len(out[0] if out else where):
            raise LindbladianError(f"{name} lists places of different size", got=f"{out[0]} and {where}")
        out.append(where)
    return out


def _couplings(coefficient: Any, count: int, name: str) -> list[TermCoefficient]:
    if isinstance(coefficient, str):
        match = _NAMED.fullmatch(coefficient)
        if match is None:
            raise LindbladianError(
                f"the coefficient of {name} can't be read",
                got=repr(coefficient),
                expected="a number, a function of time, or a parameter such as 'g' or '0.5*g'",
            )
        return [TermCoefficient(factor=float(match[1] or 1.0), parameter=match[2])] * count
    if callable(coefficient) and not isinstance(coefficient, Tensor):
        return [TermCoefficient(function=coefficient)] * count
    values = list(coefficient) if _is_listing(coefficient) else [coefficient] * count
    if len(values) != count:
        raise LindbladianError(
            f"{name} needs one coefficient a place, or one for all", got=f"{len(values)} for {count} places"
        )
    return [_number(value, name) for value in values]


def _is_listing(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return True
    return bool(getattr(value, "ndim", 0))


def _number(value: Any, name: str) -> TermCoefficient:
    if isinstance(value, Tensor) and value.requires_grad:
        return TermCoefficient(value=value.reshape(()))
    if isinstance(value, (str, type(None))) or (callable(value) and not isinstance(value, Tensor)):
        return _couplings(value, 1, name)[0] if value is not None else _bad_number(value, name)
    number = complex(value)
    if number.imag != 0 or not torch.isfinite(torch.tensor(number.real)):
        return _bad_number(value, name)
    return TermCoefficient(factor=number.real)


def _bad_number(value: Any, name: str) -> TermCoefficient:
    raise LindbladianError(
        f"the coefficient of {name} must be real and finite",
        got=repr(value),
        hint="put phases into the operator; a Hamiltonian term has to be Hermitian as a whole",
    )


def _check_hermitian(matrix: Tensor, name: str) -> None:
    deviation = float((matrix - matrix.mH).abs().max())
    if deviation > 1e-10 * max(1.0, float(matrix.abs().max())):
        raise LindbladianError(
            f"{name} isn't Hermitian",
            got=f"a deviation of {deviation:.3g} from its adjoint",
            hint="write an operator together with its adjoint, h + h.mH, as one term",
        )
