"""Observables of a lattice: weighted sums of products of operators, on density matrices, probabilities and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_positive_int, check_type
from stochdyn.core.forward.outcomes import all_configurations, encode
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, LindbladianError, ShapeError, TooFewDrawsError
from stochdyn.povm.frames.embedding import full_operator
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.operators import as_array, as_matrix, as_operator, named_operator, split_name
from stochdyn.povm.frames.products import coefficients_of
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.frames.sizes import check_size

if TYPE_CHECKING:
    from scipy import sparse

__all__ = [
    "Estimator",
    "Observable",
    "Product",
    "correlations",
    "observable",
    "observables",
    "structure_factor",
]

Povm = Frame | SiteFrames
_MAX_JOINT = 1 << 10


@dataclass(frozen=True)
class Product:
    r"""A product of operators at many places, with a weight for each, :math:`\sum_Sw_SO_S`.

    Attributes:
        factors: The matrices whose Kronecker product is the operator of a place, each on one site or a few.
        places: The ``k`` sites of each place.
        weights: The weight of each place, real or complex.
    """

    factors: tuple[Tensor, ...]
    places: tuple[tuple[int, ...], ...]
    weights: tuple[complex, ...]

    def widths(self, dim: int) -> tuple[int, ...]:
        """Return on how many sites each factor acts."""
        return tuple(round(math.log(f.shape[0], dim)) for f in self.factors)

    def matrix(self) -> Tensor:
        """Return the operator of a place."""
        return reduce(torch.kron, self.factors)


@dataclass(frozen=True)
class Observable:
    r"""A weighted sum of products of operators: a magnetisation, a correlation, an energy, a current.

    .. math:: O = \sum_{S}w_S\,O_S

    Observables add up, ``2 * a + b``, and have complex means where they aren't Hermitian, such as a coherence.

    Attributes:
        terms: The products of operators with their places and weights.
        num_sites: The number of sites of the lattice.
        dim: The number of levels of a site.
    """

    terms: tuple[Product, ...]
    num_sites: int
    dim: int = 2

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """All places, term by term."""
        return tuple(place for term in self.terms for place in term.places)

    @cached_property
    def is_hermitian(self) -> bool:
        """Whether the whole is Hermitian, so that its mean is real.

        Products on the same sites are added up first, as far as these have at most 1024 levels together.
        """
        total: dict[tuple[int, ...], Tensor] = {}
        for term in self.terms:
            if term.matrix().shape[0] > _MAX_JOINT:
                own = all(_is_hermitian(f) for f in term.factors)
                if not own or any(complex(w).imag for w in term.weights):
                    return False
                continue
            matrix = term.matrix()
            for place, weight in zip(term.places, term.weights, strict=True):
                order = sorted(range(len(place)), key=place.__getitem__)
                axes = [*order, *(len(place) + i for i in order)]
                moved = matrix.reshape((self.dim,) * (2 * len(place))).permute(axes).reshape(matrix.shape)
                key = tuple(sorted(place))
                total[key] = total[key] + weight * moved if key in total else weight * moved
        return all(_is_hermitian(m) for m in total.values())

    def __add__(self, other: Observable) -> Observable:
        """Return the sum of two observables of one lattice."""
        if not isinstance(other, Observable):
            return NotImplemented
        if (self.num_sites, self.dim) != (other.num_sites, other.dim):
            raise InvalidInputError("observables are of different lattices", got=f"{other.num_sites} sites")
        return Observable(self.terms + other.terms, self.num_sites, self.dim)

    def __mul__(self, factor: complex) -> Observable:
        """Return a multiple of the observable."""
        if not isinstance(factor, int | float | complex):
            return NotImplemented
        terms = tuple(replace(t, weights=tuple(factor * w for w in t.weights)) for t in self.terms)
        return Observable(terms, self.num_sites, self.dim)

    __rmul__ = __mul__

    def __sub__(self, other: Observable) -> Observable:
        """Return the difference of two observables of one lattice."""
        return self + (-1.0) * other

    def estimator(
        self,
        povm: Povm,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Estimator:
        """Return the function that gives the observable's value at outcomes of a measurement of every site."""
        check_type(povm, (Frame, SiteFrames), "povm", hint="such as stochdyn.povm.Tetrahedral()")
        return Estimator(self, povm, dtype, device)

    def estimate(self, povm: Povm, a: Tensor) -> Estimate:
        r"""Return mean and standard error from independent outcomes ``(n, N)``.

        The sum over places is taken sample by sample, so that the error counts their correlation.

        Raises:
            TooFewDrawsError: If there are fewer than two samples.
        """
        a = as_array(a, "a")
        if a.ndim < 1 or a.shape[0] < 2:
            raise TooFewDrawsError("a standard error needs at least two samples", got=len(a) if a.ndim else 0)
        return Estimate.of(self.estimator(povm, device=a.device)(a))

    def mean(self, povm: Povm, p: Tensor) -> Tensor:
        """Return the exact mean ``(*batch)`` for probabilities ``(*batch, K**N)`` of all outcomes."""
        p = as_array(p, "p")
        table = self.estimator(povm, dtype=p.dtype, device=p.device)
        values = table(all_configurations(self.num_sites, povm.num_outcomes, p.device))
        if p.shape[-1] != values.shape[0]:
            raise ShapeError(
                "p must have one probability for each outcome", got=p.shape[-1], expected=values.shape[0]
            )
        return p.to(values.dtype) @ values

    def sparse(self) -> sparse.csr_matrix:
        """Return the operator of the whole lattice as a sparse matrix ``(d**N, d**N)``."""
        total: Any = None
        for term in self.terms:
            matrix = term.matrix()
            for place, weight in zip(term.places, term.weights, strict=True):
                part = weight * full_operator(matrix, place, self.num_sites, self.dim)
                total = part if total is None else total + part
        return total.tocsr()

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of the operator of the whole lattice."""
        # Tr rho O = sum_rc O_rc rho_cr over the nonzero entries of O alone
        coo = self.sparse().tocoo()
        return (
            torch.from_numpy(coo.row.astype("int64")),
            torch.from_numpy(coo.col.astype("int64")),
            torch.from_numpy(coo.data),
        )

    def expectation(self, rho: Tensor) -> Tensor:
        r"""Return :math:`\operatorname{Tr}\rho O` ``(*batch)`` for density matrices ``(*batch, d**N, d**N)``."""
        size = self.dim**self.num_sites
        rho = as_array(rho, "rho")
        if rho.ndim < 2 or rho.shape[-1] != size or rho.shape[-2] != size:
            raise ShapeError("the density matrix has the wrong size", got=tuple(rho.shape), expected=size)
        rows, columns, values = (x.to(rho.device) for x in self._entries)
        entries = rho[..., columns, rows]
        total = (entries.to(values.dtype) * values).sum(-1)
        return total.real if self.is_hermitian else total


class Estimator:
    r"""Values of an observable at outcomes, :math:`o(a)=\operatorname{Tr}\,O N_a`, whose mean is that of the observable.

    Args:
        observable: The observable of a lattice whose values are wanted.
        povm: The frame of all sites, or one for each site.
        dtype: The real precision of the values.
        device: The device on which the tables live.
    """

    def __init__(
        self, observable: Observable, povm: Povm, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self.num_sites, self.num_outcomes = observable.num_sites, povm.num_outcomes
        self.is_complex = not observable.is_hermitian
        real_only = all(
            all(_is_hermitian(f) for f in t.factors) and not any(complex(w).imag for w in t.weights)
            for t in observable.terms
        )
        inner = dtype if real_only else torch.promote_types(dtype, torch.complex64)
        self._terms: list[tuple[list[tuple[Tensor, Tensor]], Tensor]] = []
        for term in observable.terms:
            places = torch.tensor(term.places, device=device)
            blocks: list[tuple[Tensor, Tensor]] = []
            first = 0
            for factor, width in zip(term.factors, term.widths(observable.dim), strict=True):
                sites = places[:, first : first + width]
                blocks.append((sites, _tables(factor, sites, povm).to(device=device, dtype=inner)))
                first += width
            weights = torch.tensor(term.weights, dtype=torch.complex128)
            weights = weights if inner.is_complex else weights.real
            self._terms.append((blocks, weights.to(device=device, dtype=inner)))

    def __call__(self, a: Tensor) -> Tensor:
        """Return values ``(*batch)`` at outcomes ``(*batch, N)``."""
        if a.ndim == 0 or a.shape[-1] != self.num_sites:
            raise ShapeError(
                "outcomes have the wrong number of sites", got=tuple(a.shape)[-1:], expected=self.num_sites
            )
        total: Tensor | None = None
        for blocks, weights in self._terms:
            product: Tensor | None = None
            for sites, table in blocks:
                # o(a) = sum_S w_S prod_f Tr(O_f N_(a_S)), each factor looked up in its table
                index = encode(a[..., sites], self.num_outcomes)
                values = table[torch.arange(sites.shape[0], device=index.device), index]
                product = values if product is None else product * values
            assert product is not None
            value = product @ weights
            total = value if total is None else total + value
        assert total is not None
        return total if self.is_complex or not total.is_complex() else total.real


def _tables(factor: Tensor, sites: Tensor, povm: Povm) -> Tensor:
    """Return the values of a factor at the outcomes of each place, made once for each set of frames."""
    cache: dict[tuple[int, ...], Tensor] = {}
    rows = []
    for place in sites.tolist():
        frames = [povm.at(site) for site in place]
        key = tuple(map(id, frames))
        if key not in cache:
            cache[key] = coefficients_of(factor, frames)
        rows.append(cache[key])
    return torch.stack(rows) if len(cache) > 1 else rows[0][None].expand(len(rows), -1)


def observable(
    spec: Any,
    num_sites: int,
    *,
    dim: int = 2,
    bonds: Sequence[tuple[int, ...]] | None = None,
    name: str = "observable",
) -> Observable:
    """Return an observable from what users write.

    Args:
        spec: The observable as one writes it: ``"Z"``, the mean over all sites; ``"ZZ"``, the mean over ``bonds``;
            ``("ZZ", (0, 1))`` on given sites; ``("ZZ", [(0, 1), (1, 2)])``, the mean over places, and ``("P1", "all")``
            over all sites. In place of the name a matrix, a ``Qobj`` or a list of these with one for each site. A list
            of ``(coefficient, operator, sites)``, as a Hamiltonian is written, is their weighted *sum* (an energy, a
            staggered magnetisation, a current), with coefficients that may be complex and may differ from place to
            place. An :class:`Observable` is passed through.
        num_sites: The number ``N`` of sites.
        dim: The number of levels of a site.
        bonds: The places that a name on two sites is averaged over.
        name: The name that messages show.

    Raises:
        LindbladianError: If a site doesn't exist or comes twice.
        InvalidInputError: If the operator is unknown, or there are no sites to put it on.

    Example:
        >>> from stochdyn.povm import Tetrahedral
        >>> a = torch.tensor([[0, 3, 0], [0, 1, 2]])
        >>> observable("Z", 3).estimator(Tetrahedral())(a).round(decimals=3)
        tensor([ 1.7320, -0.5770], dtype=torch.float64)
        >>> staggered = observable([([1.0, -1.0, 1.0], "Z", "all")], 3)
        >>> staggered.is_hermitian, observable(("sigma-", 0), 3).is_hermitian
        (True, False)
    """
    check_positive_int(num_sites, "num_sites")
    check_positive_int(dim, "dim", 2)
    if isinstance(spec, Observable):
        if (spec.num_sites, spec.dim) != (num_sites, dim):
            raise InvalidInputError(f"{name} is one of another lattice", got=f"{spec.num_sites} sites")
        return spec
    if _is_sum(spec):
        return _read_sum(spec, num_sites, dim, name)
    located = isinstance(spec, tuple) and len(spec) == 2
    operator, sites = spec if located else (spec, None)
    factors = _factors(operator, dim, name)
    k = sum(round(math.log(f.shape[0], dim)) for f in factors)
    if sites is None:
        if k == 1:
            sites = "all"
        elif k == 2 and bonds:
            sites = [tuple(bond) for bond in bonds]
        else:
            raise InvalidInputError(
                f"{name} needs sites",
                got=repr(spec)[:60],
                expected="(operator, sites), such as ('ZZ', (0, 1))",
            )
    places = _places(sites, k, num_sites, name)
    weight = 1 / len(places)
    return Observable((Product(factors, places, (weight,) * len(places)),), num_sites, dim)


def _is_sum(spec: Any) -> bool:
    return isinstance(spec, list) and bool(spec) and all(isinstance(e, tuple) and len(e) == 3 for e in spec)


def _read_sum(spec: Sequence[Any], num_sites: int, dim: int, name: str) -> Observable:
    terms = []
    for coefficient, operator, sites in spec:
        factors = _factors(operator, dim, name)
        places = _places(sites, sum(round(math.log(f.shape[0], dim)) for f in factors), num_sites, name)
        listed = isinstance(coefficient, list | tuple) or bool(getattr(coefficient, "ndim", 0))
        values = list(coefficient) if listed else [coefficient] * len(places)
        if len(values) != len(places):
            raise InvalidInputError(
                f"{name} needs one coefficient for each place, or one for all",
                got=f"{len(values)} for {len(places)} places",
            )
        try:
            weights = tuple(complex(v) for v in values)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"the coefficients of {name} must be numbers", got=repr(coefficient)[:60]
            ) from error
        if not all(math.isfinite(w.real) and math.isfinite(w.imag) for w in weights):
            raise InvalidInputError(f"the coefficients of {name} must be finite", got=repr(coefficient)[:60])
        terms.append(Product(factors, places, weights))
    return Observable(tuple(terms), num_sites, dim)


def observables(
    specs: Mapping[str, Any] | Sequence[Any],
    num_sites: int,
    *,
    dim: int = 2,
    bonds: Sequence[tuple[int, ...]] | None = None,
) -> dict[str, Observable]:
    """Return observables by name; a list such as ``["X", ("ZZ", (0, 3))]`` names them ``"X"`` and ``"ZZ(0,3)"``.

    Args:
        specs: A mapping from names to what :func:`observable` takes, or a list of the latter.
        num_sites: The number ``N`` of sites.
        dim: The number of levels of a site.
        bonds: The places that a name on two sites is averaged over.

    Raises:
        LindbladianError, InvalidInputError: As for :func:`observable`.
    """
    if isinstance(specs, str) or not isinstance(specs, Mapping | list | tuple):
        raise InvalidInputError("observables must be a mapping or a list", got=type(specs).__name__)
    if not isinstance(specs, Mapping):
        if isinstance(specs, tuple) and len(specs) == 2 and not isinstance(specs[1], str):
            is_one = isinstance(specs[1], tuple | int) and isinstance(specs[0], str)
            if is_one:
                raise InvalidInputError(
                    "observables must be a mapping or a list",
                    got=repr(specs)[:60],
                    hint=f"one observable alone is [{specs!r}]",
                )
        specs = {_name_of(spec): spec for spec in specs}
    return {
        str(name): observable(spec, num_sites, dim=dim, bonds=bonds, name=f"observable {name!r}")
        for name, spec in specs.items()
    }


def _name_of(spec: Any) -> str:
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str):
        sites = spec[1]
        if isinstance(sites, str):
            return spec[0]
        flat = str(sites).replace(" ", "")
        return spec[0] + (flat if isinstance(sites, tuple | list) else f"({flat})")
    return str(spec)


def correlations(first: Any, second: Any, num_sites: int) -> dict[str, Any]:
    r"""Return all pair correlations :math:`\langle A_iB_j\rangle` as observables by name, ``"Z0 Z1"`` and so on.

    Args:
        first: The operator ``A`` of a site: a name, a matrix or a ``Qobj``.
        second: The operator ``B`` of a site, in the same form.
        num_sites: The number ``N`` of sites.

    Returns:
        What ``observables=`` of the solvers takes, ``"A0 B1"`` and so on where operators have no names; pairs of a site
        with itself are left out, and of two equal operators each pair comes once.

    Example:
        >>> list(correlations("Z", "Z", 3))
        ['Z0 Z1', 'Z0 Z2', 'Z1 Z2']
    """
    check_positive_int(num_sites, "num_sites", 2)
    a = first if isinstance(first, str) else as_matrix(first, "first")
    b = second if isinstance(second, str) else as_matrix(second, "second")
    if isinstance(a, str) and isinstance(b, str):
        same, names = a == b, (a, b)
    else:
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        names = (a if isinstance(a, str) else "A", b if isinstance(b, str) else "A" if same else "B")
    return {
        f"{names[0]}{i} {names[1]}{j}": ([a, b], (i, j))
        for i in range(num_sites)
        for j in range(num_sites)
        if i < j or (i > j and not same)
    }


def structure_factor(
    operator: Any, wave_vector: Any, shape: int | Sequence[int], *, dim: int = 2
) -> Observable:
    r"""Return the structure factor of an operator of a site.

    .. math:: S(k)=\frac1N\sum_{ij}e^{ik\cdot(r_i-r_j)}\,O_iO_j

    Args:
        operator: A Hermitian operator ``O`` of one site.
        wave_vector: The wave vector ``k``, one number for each axis of the lattice, in units of the inverse lattice
            constant.
        shape: The sizes of the lattice, the last axis fastest; a number for a chain.
        dim: The number of levels of a site.

    Raises:
        InvalidInputError: If the operator isn't Hermitian or on one site, or the wave vector doesn't fit.

    Example:
        >>> state = torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.complex128))  # both up
        >>> float(structure_factor("Z", 0.0, 2).expectation(state))
        2.0
    """
    sizes: list[Any] = list(shape) if isinstance(shape, list | tuple) else [shape]
    for size in sizes:
        check_size(size, "shape", 1 << 10)
    check_size(math.prod(sizes), "the number of sites of shape", 1 << 10)
    k = as_tensor(wave_vector, "wave_vector", like=torch.empty(0, dtype=torch.float64)).double().reshape(-1)
    if len(k) != len(sizes):
        raise InvalidInputError("wave_vector needs one number for each axis", got=len(k), expected=len(sizes))
    matrix = as_operator(operator, dim, 1)
    if not _is_hermitian(matrix):
        raise InvalidInputError("the operator of a structure factor must be Hermitian")
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sizes)).reshape(
        -1, len(sizes)
    )
    phase, n = grid @ k, len(grid)
    pairs = tuple((i, j) for i in range(n) for j in range(i))
    # both orders of a pair together: twice the cosine
    weights = tuple(2 * math.cos(float(phase[i] - phase[j])) / n for i, j in pairs)
    own = Product((matrix @ matrix,), tuple((i,) for i in range(n)), (1 / n,) * n)
    terms = (own, Product((matrix, matrix), pairs, weights)) if pairs else (own,)
    return Observable(terms, n, dim)


def _is_hermitian(matrix: Tensor) -> bool:
    return float((matrix - matrix.mH).abs().max()) <= 1e-10 * float(matrix.abs().max())


def _factors(operator: Any, dim: int, name: str) -> tuple[Tensor, ...]:
    if isinstance(operator, str):
        matrices: tuple[Tensor, ...] = tuple(named_operator(part, dim) for part in split_name(operator))
    elif (
        isinstance(operator, list)
        and operator
        and (isinstance(operator[0], str) or hasattr(operator[0], "shape"))
    ):
        matrices = tuple(as_operator(part, dim, 1, name) for part in operator)
    else:
        matrices = (as_operator(operator, dim, name=name),)
    return matrices


def _places(sites: Any, k: int, num_sites: int, name: str) -> tuple[tuple[int, ...], ...]:
    from stochdyn.povm.lindblad.terms import read_places

    places = read_places(sites, num_sites, name, k)
    if not places:
        raise InvalidInputError(f"{name} has no sites")
    if len(places[0]) != k:
        raise InvalidInputError(f"{name} acts on {k} site(s)", got=places[0])
    return tuple(places)


def check_sites(sites: object, num_sites: int) -> None:
    """Raise unless sites are different and exist.

    Raises:
        LindbladianError: If a site isn't an integer, doesn't exist or comes twice.
    """
    if isinstance(sites, Tensor | np.ndarray):
        sites = sites.tolist()
    if not isinstance(sites, list | tuple | range):
        raise InvalidInputError("sites must be a list of integers", got=repr(sites)[:60])
    numbers = list(sites)
    for s in numbers:
        if isinstance(s, bool) or not hasattr(s, "__index__"):
            raise LindbladianError("sites must be integers", got=repr(sites)[:60])
    if len(set(numbers)) != len(numbers):
        raise LindbladianError("a site comes twice", got=tuple(numbers))
    outside = [s for s in numbers if not 0 <= s < num_sites]
    if outside or not numbers:
        raise LindbladianError(
            "a site doesn't exist",
            got=outside[0] if outside else "no sites",
            expected=f"sites 0 to {num_sites - 1}",
        )
