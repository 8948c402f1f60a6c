"""Local matrices of the master equation: what a term of a Lindbladian does to outcome probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.products import Expansion, product_dual, product_effects
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.lindblad.pauli import OperatorBasis

__all__ = ["correlation_matrix", "hamiltonian_matrix", "jump_matrix", "merge_terms"]

LocalMatrix = tuple[tuple[int, ...], Tensor]


def hamiltonian_matrix(h: Tensor, frames: Sequence[Expansion]) -> Tensor:
    r"""Return the rates that a Hamiltonian term causes between outcomes of its sites.

    .. math:: A_{ab} = -i\operatorname{Tr}\bigl(M_a[h,N_b]\bigr)

    Args:
        h: The Hermitian matrix ``(d**k, d**k)`` of the term.
        frames: The frames of the ``k`` sites.

    Returns:
        ``(K**k, K**k)`` float64 with zero column sums, from ``b`` into ``a``; the first site slowest.

    Example:
        >>> from stochdyn.povm import Tetrahedral, named_operator
        >>> hamiltonian_matrix(named_operator("X"), [Tetrahedral()]).round().tolist()[3]
        [1.0, -1.0, 0.0, 0.0]
    """
    dual = product_dual(frames)
    return _rates(-1j * (h @ dual - dual @ h), frames)


def jump_matrix(c: Tensor, frames: Sequence[Expansion]) -> Tensor:
    r"""Return the rates that a jump operator of unit rate causes between outcomes of its sites.

    .. math:: A_{ab} = \operatorname{Tr}\Bigl(M_a\bigl(cN_bc^\dagger-\tfrac12\{c^\dagger c,N_b\}\bigr)\Bigr)

    Args:
        c: The jump operator ``(d**k, d**k)``.
        frames: The frames of the ``k`` sites.

    Returns:
        ``(K**k, K**k)`` float64 with zero column sums, from ``b`` into ``a``; the first site slowest.
    """
    dual = product_dual(frames)
    # c N c^dagger - {c^dagger c, N}/2 for every element of the dual frame
    square = c.mH @ c
    return _rates(c @ dual @ c.mH - 0.5 * (square @ dual + dual @ square), frames)


def correlation_matrix(
    first: tuple[Tensor, tuple[int, ...]],
    second: tuple[Tensor, tuple[int, ...]],
    povm: Frame | SiteFrames | OperatorBasis,
) -> LocalMatrix:
    r"""Return the rates that two parts of one jump operator cause together.

    .. math::
        A_{ab} = \operatorname{Tr}\Bigl(M_a\bigl(c_iN_bc_j^\dagger-\tfrac12\{c_j^\dagger c_i,N_b\}\bigr)\Bigr)
        +\text{the same with } i\leftrightarrow j

    Args:
        first: The matrix ``c_i`` and its sites.
        second: The matrix ``c_j`` and its sites, which may overlap with the others.
        povm: The frame of all sites, or one for each site.

    Returns:
        The sites of both and a matrix ``(K**k, K**k)`` on them, as for :func:`jump_matrix`.
    """
    sites = tuple(sorted({*first[1], *second[1]}))
    frames = [povm.at(site) for site in sites]
    ci, cj = (_embed(m, where, sites, povm.dim) for m, where in (first, second))
    dual = product_dual(frames)
    mixed = ci.mH @ cj + cj.mH @ ci
    change = ci @ dual @ cj.mH + cj @ dual @ ci.mH - 0.5 * (mixed @ dual + dual @ mixed)
    return sites, _rates(change, frames)


def _rates(changes: Tensor, frames: Sequence[Expansion]) -> Tensor:
    effects = product_effects(frames)
    matrix = (effects.flatten(1) @ changes.mT.flatten(1).mT).real
    scale = matrix.abs().max()
    # what is zero but for rounding must be an exact zero, since zeros are skipped
    return torch.where(matrix.abs() > 1e-14 * effects.shape[0] * scale, matrix, torch.zeros_like(matrix))


def merge_terms(terms: Sequence[LocalMatrix], num_outcomes: int) -> list[LocalMatrix]:
    """Add up matrices on the same sites, and absorb those on fewer sites where a larger term covers them.

    Args:
        terms: The terms as pairs of sites and a matrix ``(K**k, K**k)``.
        num_outcomes: The number ``K`` of outcomes of a site.

    Returns:
        The same operator in fewer terms; sites increase within each.
    """
    merged: dict[tuple[int, ...], Tensor] = {}
    for sites, matrix in terms:
        order = tuple(sorted(sites))
        ordered = _embed(matrix, sites, order, num_outcomes)
        merged[order] = merged[order] + ordered if order in merged else ordered
    load: dict[tuple[int, ...], int] = dict.fromkeys(merged, 0)
    by_site: dict[int, list[tuple[int, ...]]] = {}
    for sites in merged:
        for site in sites:
            by_site.setdefault(site, []).append(sites)
    for sites in sorted(merged, key=len):
        # a term is added to the least loaded larger one that holds its sites, so fewer matrices are evaluated
        covers = [s for s in by_site[sites[0]] if len(s) > len(sites) and set(sites) < set(s)]
        if covers:
            home = min(covers, key=lambda s: (len(s), load[s]))
            load[home] += 1
            merged[home] = merged[home] + _embed(merged.pop(sites), sites, home, num_outcomes)
            for site in sites:
                by_site[site].remove(sites)
    return list(merged.items())


def _embed(matrix: Tensor, sites: tuple[int, ...], into: tuple[int, ...], q: int) -> Tensor:
    """Write a matrix on ``sites`` as one on ``into``, which holds them all."""
    rest = tuple(s for s in into if s not in sites)
    n = len(into)
    full = torch.kron(matrix, torch.eye(q ** len(rest), dtype=matrix.dtype, device=matrix.device))
    place = [(*sites, *rest).index(s) for s in into]
    axes = [*place, *(n + p for p in place)]
    return full.reshape((q,) * (2 * n)).permute(axes).reshape(q**n, q**n)
