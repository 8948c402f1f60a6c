"""Observables of a lattice: averages of operators over places, on density matrices, probabilities and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.forward.outcomes import all_configurations, encode
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, LindbladianError, ShapeError, TooFewDrawsError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.operators import as_operator, named_operator, split_name
from stochdyn.povm.frames.products import coefficients_of
from stochdyn.povm.frames.site_frames import SiteFrames

__all__ = ["Estimator", "Observable", "observable", "observables"]

Povm = Frame | SiteFrames


@dataclass(frozen=True)
class Observable:
    r"""The mean over places of a product of operators, such as the magnetisation or a correlation of neighbours.

    .. math:: O = \frac1{|P|}\sum_{S\in P} O_S

    Attributes:
        factors: matrices whose Kronecker product is the operator of a place, each on one site or a few.
        places: ``k`` sites each.
        num_sites: of the lattice.
        dim: levels of a site.
    """

    factors: tuple[Tensor, ...]
    places: tuple[tuple[int, ...], ...]
    num_sites: int
    dim: int = 2

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """On how many sites each factor acts."""
        return tuple(round(math.log(f.shape[0], self.dim)) for f in self.factors)

    def estimator(
        self,
        povm: Povm,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Estimator:
        """Return the function that gives the observable's value at outcomes of a measurement of every site."""
        return Estimator(self, povm, dtype, device)

    def estimate(self, povm: Povm, a: Tensor) -> Estimate:
        r"""Return mean and standard error from independent outcomes ``(n, N)``.

        The mean over places is taken sample by sample, so that the error counts their correlation.

        Raises:
            TooFewDrawsError: if there are fewer than two samples.
        """
        if a.shape[0] < 2:
            raise TooFewDrawsError("a standard error needs at least two samples", got=a.shape[0])
        return Estimate.of(self.estimator(povm, device=a.device)(a))

    def mean(self, povm: Povm, p: Tensor) -> Tensor:
        """Return the exact mean ``(*batch)`` for probabilities ``(*batch, K**N)`` of all outcomes."""
        table = self.estimator(povm, dtype=p.dtype, device=p.device)
        values = table(all_configurations(self.num_sites, povm.num_outcomes, p.device))
        return p @ values

    def expectation(self, rho: Tensor) -> Tensor:
        r"""Return :math:`\operatorname{Tr}\rho O` ``(*batch)`` for density matrices ``(*batch, d**N, d**N)``."""
        n, d = self.num_sites, self.dim
        if rho.shape[-1] != d**n:
            raise ShapeError("the density matrix has the wrong size", got=rho.shape[-1], expected=d**n)
        total = rho.new_zeros(rho.shape[:-2])
        operator = _product(self.factors).to(rho)
        for place in self.places:
            total = total + torch.einsum("...ij,ji->...", partial_trace(rho, place, n, d), operator)
        return (total / len(self.places)).real


class Estimator:
    r"""Values of an observable at outcomes, :math:`o(a)=\operatorname{Tr}\,O N_a`, whose mean is that of the observable.

    Args:
        observable: of a lattice.
        povm: the frame of all sites, or one a site.
        dtype: of the values.
        device: of the tables.
    """

    def __init__(
        self, observable: Observable, povm: Povm, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self.num_sites, self.num_outcomes = observable.num_sites, povm.num_outcomes
        places = torch.tensor(observable.places, device=device)
        self._blocks: list[tuple[Tensor, Tensor]] = []
        first = 0
        for factor, width in zip(observable.factors, observable.widths, strict=True):
            sites = places[:, first : first + width]
            cache: dict[tuple[int, ...], Tensor] = {}
            rows = []
            for place in sites.tolist():
                frames = [povm.at(site) for site in place]
                key = tuple(map(id, frames))
                if key not in cache:
                    values = coefficients_of(factor, frames)
                    if values.is_complex():
                        raise InvalidInputError("an observable must be Hermitian")
                    cache[key] = values
                rows.append(cache[key])
            table = torch.stack(rows) if len(cache) > 1 else rows[0][None].expand(len(rows), -1)
            self._blocks.append((sites, table.to(device=device, dtype=dtype)))
            first += width

    def __call__(self, a: Tensor) -> Tensor:
        """Return values ``(*batch)`` at outcomes ``(*batch, N)``."""
        if a.shape[-1] != self.num_sites:
            raise ShapeError(
                "outcomes have the wrong number of sites", got=a.shape[-1], expected=self.num_sites
            )
        product: Tensor | None = None
        for sites, table in self._blocks:
            index = encode(a[..., sites], self.num_outcomes)
            values = table[torch.arange(sites.shape[0], device=index.device), index]
            product = values if product is None else product * values
        assert product is not None
        return product.mean(-1)


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
        spec: ``"Z"``, the mean over all sites; ``"ZZ"``, the mean over ``bonds``; ``("ZZ", (0, 1))`` on given sites;
            ``("ZZ", [(0, 1), (1, 2)])``, the mean over places. In place of the name a Hermitian matrix, a ``Qobj``
            or a list of these, one a site. An :class:`Observable` is passed through.
        num_sites: ``N``.
        dim: levels of a site.
        bonds: what a name on two sites is averaged over.
        name: shown in messages.

    Raises:
        LindbladianError: if a site doesn't exist or comes twice.
        InvalidInputError: if the operator is unknown or not Hermitian, or there are no sites to put it on.

    Example:
        >>> from stochdyn.povm import Tetrahedral
        >>> a = torch.tensor([[0, 3, 0], [0, 1, 2]])
        >>> observable("Z", 3).estimator(Tetrahedral())(a).round(decimals=3)
        tensor([ 1.7320, -0.5770], dtype=torch.float64)
    """
    if isinstance(spec, Observable):
        if (spec.num_sites, spec.dim) != (num_sites, dim):
            raise InvalidInputError(f"{name} is one of another lattice", got=f"{spec.num_sites} sites")
        return spec
    located = isinstance(spec, tuple) and len(spec) == 2
    operator, sites = spec if located else (spec, None)
    factors = _factors(operator, dim, name)
    k = sum(round(math.log(f.shape[0], dim)) for f in factors)
    if sites is None:
        if k == 1:
            sites = list(range(num_sites))
        elif k == 2 and bonds:
            sites = [tuple(bond) for bond in bonds]
        else:
            raise InvalidInputError(
                f"{name} needs sites",
                got=repr(spec)[:60],
                expected="(operator, sites), such as ('ZZ', (0, 1))",
            )
    places = _places(sites, k, num_sites, name)
    return Observable(factors, places, num_sites, dim)


def observables(
    specs: Mapping[str, Any] | Sequence[Any],
    num_sites: int,
    *,
    dim: int = 2,
    bonds: Sequence[tuple[int, ...]] | None = None,
) -> dict[str, Observable]:
    """Return observables by name; a list of names such as ``["X", "ZZ"]`` names them after themselves.

    Raises:
        LindbladianError, InvalidInputError: as for :func:`observable`.
    """
    if isinstance(specs, str) or not isinstance(specs, (Mapping, Sequence)):
        raise InvalidInputError("observables must be a mapping or a list", got=type(specs).__name__)
    if not isinstance(specs, Mapping):
        specs = {str(spec): spec for spec in specs}
    return {
        name: observable(spec, num_sites, dim=dim, bonds=bonds, name=f"observable {name!r}")
        for name, spec in specs.items()
    }


def partial_trace(rho: Tensor, sites: Sequence[int], num_sites: int, dim: int) -> Tensor:
    """Return the reduced density matrices ``(*batch, d**k, d**k)`` on some sites, in their order.

    Args:
        rho: ``(*batch, d**N, d**N)``.
        sites: ``k`` of them.
        num_sites: ``N``.
        dim: ``d``.
    """
    batch, n = rho.shape[:-2], num_sites
    rest = [i for i in range(n) if i not in sites]
    tensor = rho.reshape(-1, *(dim,) * (2 * n))
    rows, columns = [1 + i for i in (*sites, *rest)], [1 + n + i for i in (*sites, *rest)]
    kept, gone = dim ** len(sites), dim ** len(rest)
    tensor = tensor.permute(0, *rows, *columns).reshape(-1, kept, gone, kept, gone)
    return torch.einsum("nigjg->nij", tensor).reshape(*batch, kept, kept)


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
    if len(matrices) == 1 or all(float((m - m.mH).abs().max()) < 1e-10 for m in matrices):
        whole = matrices
    else:  # sigma+ sigma- and the like are Hermitian only together, if at all
        whole = (_product(matrices),)
    for m in whole:
        if float((m - m.mH).abs().max()) > 1e-10:
            raise InvalidInputError(
                f"{name} isn't Hermitian",
                hint="take real and imaginary parts, (o + o.mH) / 2 and (o - o.mH) / 2j",
            )
    return whole


def _product(matrices: Sequence[Tensor]) -> Tensor:
    out = matrices[0]
    for m in matrices[1:]:
        out = torch.kron(out, m)
    return out


def _places(sites: Any, k: int, num_sites: int, name: str) -> tuple[tuple[int, ...], ...]:
    listed = sites if isinstance(sites, list) else [sites]
    places = [tuple(p) if isinstance(p, (tuple, list)) else (p,) for p in listed]
    if not places:
        raise InvalidInputError(f"{name} has no sites")
    for place in places:
        if len(place) != k:
            raise InvalidInputError(f"{name} acts on {k} site(s)", got=place)
        outside = [
            s for s in place if isinstance(s, bool) or not hasattr(s, "__index__") or not 0 <= s < num_sites
        ]
        if outside:
            raise LindbladianError(
                f"{name} is on a site that doesn't exist",
                got=outside[0],
                expected=f"sites 0 to {num_sites - 1}",
            )
        if len(set(place)) != k:
            raise LindbladianError(f"{name} names a site twice", got=place)
    return tuple(tuple(s.__index__() for s in place) for place in places)
