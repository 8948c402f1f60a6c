"""Terms of a Lindbladian as users write them, checked and turned into matrices on their sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.errors import LindbladianError
from stochdyn.povm.frames.operators import as_operator
from stochdyn.povm.lindblad.coefficients import Coefficient, read_coefficient

__all__ = ["CollectiveJump", "Part", "Term", "parse_hamiltonian", "parse_jumps", "read_places"]

Part = tuple[Tensor, tuple[int, ...]]


@dataclass(frozen=True)
class Term:
    """One local term: a coefficient, a matrix and the sites on which it acts.

    Attributes:
        coupling: The coefficient of the term; of a jump, its rate.
        matrix: The matrix ``(d**k, d**k)`` on the sites, complex128, the first of the sites slowest.
        sites: The ``k`` different sites that the matrix acts on.
    """

    coupling: Coefficient
    matrix: Tensor
    sites: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The local matrices whose sum the operator is: the one."""
        return ((self.matrix, self.sites),)


@dataclass(frozen=True)
class CollectiveJump:
    r"""A jump whose operator is a sum of local ones, :math:`L=\sum_ic_i`, such as that of superradiant decay.

    .. math::
        \mathcal D[L]\rho = \sum_{ij}\Bigl(c_i\rho c_j^\dagger-\tfrac12\{c_j^\dagger c_i,\rho\}\Bigr)

    Attributes:
        coupling: The rate of the jump.
        parts: The parts of the operator, as pairs of a matrix ``(d**k, d**k)`` and its sites.
    """

    coupling: Coefficient
    parts: tuple[Part, ...]

    @property
    def sites(self) -> tuple[int, ...]:
        """All sites that it acts on."""
        return tuple(sorted({site for _, sites in self.parts for site in sites}))


def parse_hamiltonian(terms: Iterable[Any], num_sites: int, dim: int) -> list[Term]:
    """Return the Hamiltonian terms of a list of ``(coefficient, operator, sites)``.

    Args:
        terms: The terms, as for :class:`~stochdyn.povm.lindblad.lindbladian.Lindbladian`.
        num_sites: The number of sites of the lattice.
        dim: The number of levels of a site.

    Raises:
        LindbladianError: If a term isn't Hermitian, or sites repeat or don't exist.
    """
    parsed: list[Term] = []
    for name, (coefficient, operator, sites) in _entries(terms, "hamiltonian"):
        matrix, places = _matrix_and_places(operator, sites, num_sites, dim, name)
        if not places:  # an empty list of bonds, say
            continue
        _check_hermitian(matrix, name)
        for coupling, place in zip(_couplings(coefficient, len(places), name), places, strict=True):
            if not coupling.is_constant or coupling.factor != 0:
                parsed.append(Term(coupling, matrix, place))
    return parsed


def parse_jumps(terms: Iterable[Any], num_sites: int, dim: int) -> list[Term | CollectiveJump]:
    """Return the jumps of a list of ``(rate, operator, sites)``.

    A rate that is a matrix ``(n, n)``, for ``n`` places, correlates them: its eigenvectors are collective jumps. An
    operator on more sites than a local term may have is taken apart into a sum of local ones.

    Args:
        terms: The terms, as for :class:`~stochdyn.povm.lindblad.lindbladian.Lindbladian`.
        num_sites: The number of sites of the lattice.
        dim: The number of levels of a site.

    Raises:
        LindbladianError: If a matrix of rates isn't Hermitian and positive, an operator on many sites isn't a sum of
            local ones, or sites repeat or don't exist.
    """
    from stochdyn.povm.lindblad.pauli import MAX_SUPPORT, split_jump

    parsed: list[Term | CollectiveJump] = []
    for name, (coefficient, operator, sites) in _entries(terms, "jump"):
        matrix, places = _matrix_and_places(operator, sites, num_sites, dim, name)
        if not places:
            continue
        if _is_matrix(coefficient):
            parsed += _correlated(coefficient, matrix, places, name)
            continue
        for coupling, place in zip(_couplings(coefficient, len(places), name), places, strict=True):
            if coupling.is_constant and coupling.factor == 0:
                continue
            if len(place) <= MAX_SUPPORT and dim ** (2 * len(place)) <= 1024:
                parsed.append(Term(coupling, matrix, place))
            else:
                parts = split_jump(matrix, place, dim, f"the operator of {name}")
                parsed.append(CollectiveJump(coupling, parts))
    return parsed


def _entries(terms: Any, kind: str) -> Iterable[tuple[str, Sequence[Any]]]:
    if isinstance(terms, str | bytes | Tensor | np.ndarray) or not isinstance(terms, Iterable):
        raise LindbladianError(
            f"the {kind} terms must be a list of (coefficient, operator, sites)", got=type(terms).__name__
        )
    for place, entry in enumerate(terms):
        name = f"{kind} term {place}"
        if isinstance(entry, str | Tensor) or not isinstance(entry, Sequence) or len(entry) != 3:
            raise LindbladianError(
                f"{name} must be (coefficient, operator, sites)",
                got=repr(entry)[:80],
                expected="three entries",
            )
        yield name, entry


def _matrix_and_places(
    operator: Any, sites: Any, num_sites: int, dim: int, name: str
) -> tuple[Tensor, list[tuple[int, ...]]]:
    matrix = as_operator(operator, dim, name=f"the operator of {name}")
    places = read_places(sites, num_sites, f"the sites of {name}", round(math.log(matrix.shape[0], dim)))
    if places:
        as_operator(matrix, dim, len(places[0]), f"the operator of {name}")
    return matrix, places


def _is_matrix(coefficient: Any) -> bool:
    """Whether a coefficient is a matrix of rates."""
    if isinstance(coefficient, list | tuple):
        return bool(coefficient) and all(
            isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1 for row in coefficient
        )
    return getattr(coefficient, "ndim", 0) == 2


def _correlated(
    rates: Any, matrix: Tensor, places: list[tuple[int, ...]], name: str
) -> list[Term | CollectiveJump]:
    """Diagonalise a matrix of rates: its eigenvectors are the weights of collective jumps."""
    try:
        gamma = torch.as_tensor(rates if isinstance(rates, Tensor) else np.array(rates)).to(torch.complex128)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LindbladianError(f"the rates of {name} must be numbers", got=repr(rates)[:60]) from error
    n = len(places)
    if gamma.shape != (n, n):
        raise LindbladianError(
            f"{name} needs one rate for each pair of places", got=tuple(gamma.shape), expected=(n, n)
        )
    scale = float(gamma.abs().max())
    if not np.isfinite(scale):
        raise LindbladianError(f"the rates of {name} must be finite")
    if float((gamma - gamma.mH).abs().max()) > 1e-10 * scale:
        raise LindbladianError(f"the matrix of rates of {name} isn't Hermitian")
    values, vectors = torch.linalg.eigh(gamma)
    if float(values[0]) < -1e-10 * scale:
        raise LindbladianError(
            f"the matrix of rates of {name} must be positive",
            got=f"an eigenvalue of {float(values[0]):.3g}",
            hint="no physical bath has such rates; |gamma_ij| is at most sqrt(gamma_ii gamma_jj)",
        )
    jumps: list[Term | CollectiveJump] = []
    for value, vector in zip(values.tolist(), vectors.mT, strict=True):
        if value <= 1e-14 * scale:
            continue
        weights = [complex(w) for w in vector]
        parts = tuple((w * matrix, place) for w, place in zip(weights, places, strict=True) if abs(w) > 1e-14)
        if len(parts) == 1:
            jumps.append(Term(Coefficient(value), *parts[0]))
        else:
            jumps.append(CollectiveJump(Coefficient(value), parts))
    return jumps


def read_places(sites: Any, num_sites: int, name: str, size: int = 1) -> list[tuple[int, ...]]:
    """Return the places that users name: a tuple, an array or a number is one, a list many, ``"all"`` every site.

    A list of as many numbers as an operator on several sites acts on is one place, since it can't be several.

    Args:
        sites: The places as written.
        num_sites: The number of sites of the lattice.
        name: What they are the places of, for messages.
        size: The number of sites that the operator there acts on.

    Raises:
        LindbladianError: If a site isn't an integer, doesn't exist or comes twice, or places differ in size.
    """
    if isinstance(sites, str):
        if sites != "all":
            raise LindbladianError(f"{name} can't be read", got=repr(sites), expected="'all', or numbers")
        groups: list[Any] = [(i,) for i in range(num_sites)]
    elif isinstance(sites, list):
        one_place = len(sites) == size > 1 and all(hasattr(s, "__index__") for s in sites)
        groups = [tuple(sites)] if one_place else sites
    elif getattr(sites, "ndim", 0) == 2:
        groups = list(sites.tolist())
    else:
        groups = [sites]
    out: list[tuple[int, ...]] = []
    for group in groups:
        one = group.tolist() if hasattr(group, "tolist") else group
        where = tuple(one) if isinstance(one, tuple | list) else (one,)
        if not where or any(isinstance(s, bool) or not hasattr(s, "__index__") for s in where):
            raise LindbladianError(f"{name} must be integers", got=repr(group)[:60])
        where = tuple(s.__index__() for s in where)
        outside = [s for s in where if not 0 <= s < num_sites]
        if outside:
            raise LindbladianError(
                f"{name}: there is a site that doesn't exist",
                got=outside[0],
                expected=f"sites 0 to {num_sites - 1}",
            )
        if len(set(where)) != len(where):
            raise LindbladianError(f"{name}: a site comes twice", got=where)
        if out and len(where) != len(out[0]):
            raise LindbladianError(f"{name}: places are of different size", got=f"{out[0]} and {where}")
        out.append(where)
    return out


def _couplings(coefficient: Any, count: int, name: str) -> list[Coefficient]:
    listed = isinstance(coefficient, list | tuple) or (
        not callable(coefficient) and bool(getattr(coefficient, "ndim", 0))
    )
    if not listed:
        return [read_coefficient(coefficient, name)] * count
    if len(coefficient) != count:
        raise LindbladianError(
            f"{name} needs one coefficient for each place, or one for all",
            got=f"{len(coefficient)} for {count} places",
        )
    return [read_coefficient(value, name) for value in coefficient]


def _check_hermitian(matrix: Tensor, name: str) -> None:
    deviation = float((matrix - matrix.mH).abs().max())
    if values_are_checked() and deviation > 1e-10 * float(matrix.abs().max()):
        raise LindbladianError(
            f"{name} isn't Hermitian",
            got=f"a deviation of {deviation:.3g} from its adjoint",
            hint="write an operator together with its adjoint, h + h.mH, as one term",
        )
