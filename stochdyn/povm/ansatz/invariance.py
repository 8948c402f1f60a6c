"""Whether a master equation is the same read along other strings."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn.core.forward.master import MasterEquation
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.core.forward.outcomes import all_configurations, encode
from stochdyn.povm.ansatz.strings import Strings

__all__ = ["irreducible_terms", "is_invariant"]

Terms = dict[tuple[int, ...], Tensor]


def irreducible_terms(operator: SparseMasterEquation, members: Sequence[int] | None = None) -> Terms:
    r"""Return the unique terms of an operator whose parts on fewer sites are split off.

    How a sum is cut into local matrices is arbitrary: a one-site term may stand in either bond. With
    :math:`E_i(A)=\operatorname{tr}_iA\otimes 1_i/K`, the parts

    .. math:: A_R = \prod_{i\in R}(1-E_i)\prod_{i\in S\setminus R}E_i\;A,\qquad A=\sum_{R\subseteq S}A_R

    have no part on fewer sites than ``R``, so the sums of them are the operator's own.

    Args:
        operator: The master equation, its coefficients constant in time.
        members: The numbers of the terms to take; all of them if None.

    Returns:
        For every set of sites the matrix ``(K**k, K**k)``; zeros are left out.
    """
    q = operator.num_outcomes
    total: Terms = {}
    scales = operator.coefficients
    for index in range(len(operator.sites)) if members is None else members:
        sites, matrix = operator.sites[index], operator.matrix(index)
        if isinstance(scales, Tensor):
            matrix = matrix * scales[index].detach()
        for size in range(len(sites) + 1):
            for kept in itertools.combinations(range(len(sites)), size):
                part = _part(matrix, len(sites), kept, q)
                where = tuple(sites[i] for i in kept)
                total[where] = total[where] + part if where in total else part
    scale = max((float(m.abs().max()) for m in total.values()), default=0.0)
    return {where: m for where, m in total.items() if float(m.abs().max()) > 1e-12 * scale}


def _part(matrix: Tensor, k: int, kept: tuple[int, ...], q: int) -> Tensor:
    """The irreducible part on the sites ``kept`` of a matrix on ``k`` sites."""
    tensor = matrix.reshape((q,) * (2 * k))
    for i in reversed([i for i in range(k) if i not in kept]):
        half = tensor.ndim // 2
        # E_i: the trace over site i over K, for sites that aren't kept
        tensor = tensor.diagonal(dim1=i, dim2=half + i).sum(-1) / q
    n = len(kept)
    for i in range(n):
        # 1 - E_i for the sites that are kept
        mean = tensor.diagonal(dim1=i, dim2=n + i).sum(-1) / q
        eye = torch.eye(q, dtype=matrix.dtype, device=matrix.device)
        spread = torch.tensordot(mean, eye, dims=0).movedim((-2, -1), (i, n + i))
        tensor = tensor - spread
    return tensor.reshape(q**n, q**n)


def is_invariant(operator: MasterEquation, strings: Strings, tolerance: float = 1e-9) -> bool:
    """Return whether a sum of local terms is the same read along each of the strings.

    Where coefficients move with time, the terms of each coefficient must be so by themselves. Operators that aren't sums
    of local terms count as not invariant.

    Args:
        operator: The master equation.
        strings: The orders of the sites, and the relabellings of their outcomes, that may be symmetries.
        tolerance: The largest difference of entries, relative to the largest entry.

    Example:
        >>> flip = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        >>> ring = SparseMasterEquation(3, 2, [((i,), flip) for i in range(3)])
        >>> is_invariant(ring, Strings.translations(3))
        True
    """
    if not isinstance(operator, SparseMasterEquation):
        return False
    if operator.coefficients is None or isinstance(operator.coefficients, Tensor):
        return _is_same(irreducible_terms(operator), operator.num_outcomes, strings, tolerance)
    places = getattr(operator.coefficients, "place", None)
    if places is None:
        return False
    groups: dict[int, list[int]] = {}
    for i, place in enumerate(places.tolist()):
        groups.setdefault(place, []).append(i)
    every = (irreducible_terms(_without_factors(operator), members) for members in groups.values())
    return all(_is_same(terms, operator.num_outcomes, strings, tolerance) for terms in every)


def _without_factors(operator: SparseMasterEquation) -> SparseMasterEquation:
    """Return the operator with all its coefficients one."""
    plain = copy.copy(operator)
    plain.coefficients = None
    return plain


def _is_same(terms: Terms, q: int, strings: Strings, tolerance: float) -> bool:
    scale = max((float(m.abs().max()) for m in terms.values()), default=0.0)
    for s in range(len(strings)):
        labels = None if strings.relabellings is None else strings.relabellings[s]
        step = strings.orders[s].argsort().tolist()  # at which step a site is read
        for sites, matrix in terms.items():
            # the term on sites S, read along the string, must be the term on the image of S with its outcomes
            # relabelled
            moved = tuple(step[x] for x in sites)
            target = tuple(sorted(moved))
            if target not in terms:
                return False
            if not sites:  # a multiple of the identity is the same everywhere
                continue
            local = all_configurations(len(sites), q, matrix.device)
            read = local if labels is None else labels.to(local.device)[local]
            image = encode(read[:, [moved.index(x) for x in target]], q)
            if float((terms[target][image[:, None], image] - matrix).abs().max()) > tolerance * scale:
                return False
    return True
