"""Whether probabilities belong to a quantum state: reduced density matrices, their eigenvalues, purity, distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_finite, check_nonempty, check_type
from stochdyn.core.forward.outcomes import encode
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, TooFewDrawsError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.lattice_observables import check_sites
from stochdyn.povm.frames.operators import as_array
from stochdyn.povm.frames.products import density_of
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.frames.sizes import check_size

__all__ = [
    "Positivity",
    "classical_fidelity",
    "marginal",
    "positivity",
    "purity",
    "reduced_density",
    "total_variation",
    "trace_distance",
]

Povm = Frame | SiteFrames
_MAX_SITES = 5


@dataclass(frozen=True)
class Positivity:
    r"""How far reduced density matrices are from being positive.

    Normalised probabilities always give matrices of trace one, yet not always positive ones. A lowest eigenvalue
    below zero by many standard errors proves that the probabilities belong to no quantum state; one above zero
    proves nothing about larger regions.

    Attributes:
        places: The sites of each reduced matrix.
        lowest: The lowest eigenvalue ``(P,)`` of each.
        stderr: The standard error ``(P,)`` by the bootstrap, zero for exact probabilities. Sampling noise pushes lowest
            eigenvalues down, by an amount of this order.
    """

    places: tuple[tuple[int, ...], ...]
    lowest: Tensor
    stderr: Tensor

    @property
    def worst(self) -> tuple[tuple[int, ...], float, float]:
        """The place with the lowest eigenvalue, that eigenvalue, and its standard error."""
        i = int(self.lowest.argmin())
        return self.places[i], float(self.lowest[i]), float(self.stderr[i])


def marginal(p: Tensor, sites: Sequence[int], num_outcomes: int) -> Tensor:
    """Return the probabilities ``(*batch, K**k)`` of the outcomes on some sites, from all, ``(*batch, K**N)``."""
    n = _num_sites(p.shape[-1], num_outcomes)
    check_sites(sites, n)
    lead = p.ndim - 1
    tensor = p.reshape(*p.shape[:-1], *(num_outcomes,) * n)
    rest = [lead + i for i in range(n) if i not in sites]
    order = [lead + i for i in sites]
    return (
        tensor.permute(*range(lead), *order, *rest)
        .reshape(*p.shape[:-1], num_outcomes ** len(sites), -1)
        .sum(-1)
    )


def reduced_density(povm: Povm, outcomes: Tensor, sites: Sequence[int]) -> Tensor:
    r"""Return the reduced density matrix on some sites.

    .. math:: \rho_A = \sum_{a_A} p(a_A)\,N_{a_A}

    Args:
        povm: The frame of all sites, or one for each site.
        outcomes: The samples ``(n, N)`` (integers), or the probabilities ``(K**N,)`` of all outcomes (floating).
        sites: The sites that are kept, at most five.

    Returns:
        ``(d**k, d**k)`` complex128, Hermitian of trace one, not necessarily positive.

    Raises:
        LindbladianError: If a site doesn't exist or comes twice.
        InvalidInputError: If there are too many sites.

    Example:
        >>> from stochdyn.povm import Tetrahedral
        >>> p = Tetrahedral().probabilities("up")
        >>> reduced_density(Tetrahedral(), p, [0]).real.abs().round(decimals=6).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    p = _local_probabilities(povm, outcomes, sites)
    return density_of(p, [povm.at(site) for site in sites])


def positivity(
    povm: Povm,
    outcomes: Tensor,
    places: Sequence[Sequence[int]],
    *,
    bootstrap: int = 50,
    generator: torch.Generator | int | None = None,
) -> Positivity:
    """Return the lowest eigenvalues of reduced density matrices.

    Args:
        povm: The frame of all sites, or one for each site.
        outcomes: The samples ``(n, N)`` (integers), or the probabilities ``(K**N,)`` of all outcomes (floating).
        places: The sites of each matrix, such as the bonds of the lattice.
        bootstrap: The number of resamplings for the standard error, of samples only.
        generator: The source of randomness of the resampling.

    Raises:
        LindbladianError: If a site doesn't exist or comes twice.
        TooFewDrawsError: If there are fewer than two samples.
    """
    outcomes = _as_outcomes(povm, outcomes)
    check_nonempty(places, "places")
    check_size(bootstrap, "bootstrap", 1 << 16, 2)
    source = as_generator(generator, outcomes.device)
    sampled = not outcomes.is_floating_point()
    if sampled and outcomes.shape[0] < 2:
        raise TooFewDrawsError("a standard error needs at least two samples", got=outcomes.shape[0])
    lowest, errors = [], []
    for sites in places:
        frames = [povm.at(site) for site in sites]
        p = _local_probabilities(povm, outcomes, sites)
        lowest.append(torch.linalg.eigvalsh(density_of(p, frames))[0])
        if not sampled:
            errors.append(torch.zeros_like(lowest[-1]))
            continue
        n = outcomes.shape[0]
        # the bootstrap: as many outcomes again, drawn from their own frequencies
        drawn = torch.multinomial(p.float().clamp(min=0).expand(bootstrap, -1), n, True, generator=source)
        counts = torch.zeros(bootstrap, p.shape[0], dtype=p.dtype, device=p.device)
        counts.scatter_add_(1, drawn, counts.new_ones(1, 1).expand(bootstrap, n))
        again = torch.stack([torch.linalg.eigvalsh(density_of(c / n, frames))[0] for c in counts])
        errors.append(again.std())
    return Positivity(tuple(tuple(s) for s in places), torch.stack(lowest), torch.stack(errors))


def purity(povm: Povm, outcomes: Tensor, *, generator: torch.Generator | int | None = 0) -> Estimate:
    r"""Return the purity of the whole system.

    .. math:: \operatorname{Tr}\rho^2 = \sum_{ab}p(a)\,T^{-1}_{ab}\,p(b)

    From samples this is a mean over pairs whose variance grows exponentially with the number of sites: use it for
    some ten at most, and look at the standard error.

    Args:
        povm: The frame of all sites, or one for each site.
        outcomes: The samples ``(n, N)`` (integers), or the probabilities ``(K**N,)`` (floating), for which the error is
            zero.
        generator: The source of randomness by which samples are paired; whatever order they come in, as stratified
            draws do in one, plays no part.

    Raises:
        TooFewDrawsError: If there are fewer than four samples.
    """
    outcomes = _as_outcomes(povm, outcomes)
    k = povm.num_outcomes
    if outcomes.is_floating_point():
        n = _num_sites(outcomes.shape[-1], k)
        tensor = outcomes.reshape((k,) * n)
        for site in range(n):
            # sum_ab p(a) T^-1_ab p(b), site by site
            inverse = povm.at(site).inverse_overlap.to(outcomes)
            tensor = torch.movedim(torch.tensordot(tensor, inverse, dims=([site], [0])), -1, site)
        mean = (tensor.reshape(-1) * outcomes).sum()
        return Estimate(mean, torch.zeros_like(mean))
    half = outcomes.shape[0] // 2
    if half < 2:
        raise TooFewDrawsError("purity needs at least four samples", got=outcomes.shape[0])
    order = torch.randperm(outcomes.shape[0], generator=as_generator(generator)).to(outcomes.device)
    a, b = outcomes[order[:half]], outcomes[order[half : 2 * half]]
    # E prod_i T^-1 over pairs of independent draws
    columns = [
        povm.at(site).inverse_overlap.to(outcomes.device)[a[:, site], b[:, site]]
        for site in range(a.shape[1])
    ]
    return Estimate.of(reduce(torch.mul, columns))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    r"""Return :math:`\tfrac12\sum_a|p(a)-q(a)|` over the last axis.

    It bounds differences of outcome frequencies, not the trace distance of the states.
    """
    p, q = _pair(p, q)
    return 0.5 * (p - q).abs().sum(-1)


def classical_fidelity(p: Tensor, q: Tensor) -> Tensor:
    r"""Return :math:`\sum_a\sqrt{p(a)q(a)}` over the last axis; negative entries count as zero."""
    p, q = _pair(p, q)
    return (p.clamp(min=0) * q.clamp(min=0)).sqrt().sum(-1)


def trace_distance(rho: Tensor, sigma: Tensor) -> Tensor:
    r"""Return :math:`\tfrac12\operatorname{Tr}|\rho-\sigma|` of Hermitian matrices ``(*batch, D, D)``."""
    rho, sigma = _pair(rho, sigma, "rho", "sigma")
    if rho.ndim < 2 or rho.shape[-1] != rho.shape[-2]:
        raise ShapeError("rho must be square matrices", got=tuple(rho.shape))
    return 0.5 * torch.linalg.eigvalsh(rho - sigma).abs().sum(-1)


def _pair(p: Any, q: Any, first: str = "p", second: str = "q") -> tuple[Tensor, Tensor]:
    """Return two things to compare as finite tensors with the same last axis."""
    p, q = as_array(p, first), as_array(q, second)
    for value, name in ((p, first), (q, second)):
        if value.dtype == torch.bool:
            raise InvalidInputError(f"{name} must be numbers", got=value.dtype)
        check_finite(torch.view_as_real(value.resolve_conj()) if value.is_complex() else value.double(), name)
    if p.ndim == 0 or q.ndim == 0 or p.shape[-1] != q.shape[-1]:
        raise ShapeError(f"{first} and {second} differ in size", got=f"{tuple(p.shape)} and {tuple(q.shape)}")
    return p, q


def _local_probabilities(povm: Povm, outcomes: Tensor, sites: object) -> Tensor:
    outcomes = _as_outcomes(povm, outcomes)
    if not isinstance(sites, list | tuple | range | Tensor):
        raise InvalidInputError("sites must be a list of integers", got=repr(sites)[:60])
    chosen: Sequence[int] = [int(s) for s in sites] if isinstance(sites, Tensor) else sites
    if len(chosen) > _MAX_SITES:
        raise InvalidInputError("too many sites", got=len(chosen), expected=f"at most {_MAX_SITES}")
    if outcomes.is_floating_point():
        return marginal(outcomes, chosen, povm.num_outcomes)
    check_sites(chosen, outcomes.shape[1])
    index = encode(outcomes[:, list(chosen)], povm.num_outcomes)
    counts = torch.bincount(index, minlength=povm.num_outcomes ** len(chosen))
    return counts.double() / outcomes.shape[0]


def _num_sites(size: int, num_outcomes: int) -> int:
    n, total = 0, 1
    while total < size:
        n, total = n + 1, total * num_outcomes
    if total != size or n == 0:
        raise ShapeError(
            "a vector over all outcomes has K**N entries", got=size, expected=f"a power of {num_outcomes}"
        )
    return n


def _as_outcomes(povm: object, outcomes: Any) -> Tensor:
    """Return outcomes, samples or probabilities, if they fit a frame."""
    check_type(povm, (Frame, SiteFrames), "povm", hint="such as stochdyn.povm.Tetrahedral()")
    assert isinstance(povm, Frame | SiteFrames)
    outcomes = as_array(outcomes, "outcomes")
    if outcomes.is_complex() or outcomes.dtype == torch.bool:
        raise InvalidInputError("outcomes must be integers, or probabilities", got=outcomes.dtype)
    if outcomes.ndim != (1 if outcomes.is_floating_point() else 2):
        raise ShapeError(
            "outcomes must be samples (n, N) or probabilities (K**N,)", got=tuple(outcomes.shape)
        )
    if not outcomes.is_floating_point() and outcomes.numel():
        low, high = int(outcomes.min()), int(outcomes.max())
        if low < 0 or high >= povm.num_outcomes:
            raise InvalidInputError(
                "an outcome is out of range", got=f"{low} to {high}", expected=f"0 to {povm.num_outcomes - 1}"
            )
    if outcomes.is_floating_point() and not bool(torch.isfinite(outcomes).all()):
        raise NonFiniteError("outcomes must be finite probabilities")
    return outcomes
