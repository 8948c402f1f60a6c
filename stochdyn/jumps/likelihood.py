"""The likelihood of a panel for many generators at once: one product of matrices for all gaps and all generators."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.jumps.panel import Gaps
from stochdyn.jumps.uniformisation import (
    _transition,
    chain_powers,
    mixture,
    paired_transition,
    poisson_weights,
    series_terms,
)

__all__ = ["PanelLikelihood", "powers"]

#: Longest gap, in expected candidate jumps, for which powers of the jump chain are summed; longer ones are squared instead.
_LONGEST = 64.0
#: Numbers that are held at once.
_CHUNK = 4_000_000
#: Generators of one product share the fastest exit rate; slower ones by more than this factor have a product of their own.
_SPREAD = 2.0
#: So many distinct rows of covariates are taken one after the other; with more and few draws, every transition has powers of its own.
_FEW = 8
# From how many draws on they are taken group by group, whatever the number of groups.
_MANY = 16


class PanelLikelihood:
    """Counts of equal transitions over equal gaps, and their log-likelihood under any number of generators.

    Args:
        gaps: All transitions between consecutive visits.
        num_states: The number of states S.

    Attributes:
        covariates: The distinct rows of covariates, ``(G, c)``.
        total: The number of transitions.
    """

    def __init__(self, gaps: Gaps, num_states: int) -> None:
        self.num_states = num_states
        if gaps.covariates.shape[1]:
            self.covariates, group = gaps.covariates.unique(dim=0, return_inverse=True)
        else:
            self.covariates, group = gaps.covariates[:1], torch.zeros(len(gaps.dt), dtype=torch.long)
        self.total = len(gaps.dt)
        self.parts = [
            _Part(gaps, (group == g).nonzero()[:, 0], num_states) for g in range(len(self.covariates))
        ]
        self.group, self.gaps = group, gaps

    def __call__(self, q: Tensor) -> Tensor:
        """Return log-likelihoods ``(B,)`` of generators ``(G, B, S, S)``, one for each distinct row of covariates."""
        # Group by group the work is in products of matrices over the draws; with few draws the calls would cost more.
        if len(self.parts) > _FEW and (q.requires_grad or q.shape[1] < _MANY):
            step = max(1, _CHUNK // (40 * self.total))
            return torch.cat([self._one_by_one(part) for part in q.split(step, 1)])
        total = q.new_zeros(q.shape[1])
        for part, own in zip(self.parts, q, strict=True):
            total = total + part(own)
        return total

    def _one_by_one(self, q: Tensor) -> Tensor:
        """Return log-likelihoods ``(B,)`` where nearly every transition has a generator of its own."""
        g = self.gaps
        rate = float((-q.detach().diagonal(dim1=-2, dim2=-1)).amax()) or 1.0
        off = q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))
        if rate * float(g.dt.max()) > _LONGEST:
            step, pairs = max(1, _CHUNK // (1000 * q.shape[1])), []
            for own, dt in zip(q[self.group].split(step), g.dt.split(step), strict=True):
                found = paired_transition(own.flatten(0, 1), dt.repeat_interleave(q.shape[1])[None])
                pairs.append(found.view_as(own))
            p = torch.cat(pairs)
            row = p[torch.arange(self.total), :, g.before]
        else:
            stack = powers(q, rate, float(g.dt.max()))
            weight = poisson_weights(g.dt * rate, len(stack))
            # P[i, :] = sum over k of Poisson weight times row i of the k-th power, for every transition
            row = torch.einsum("kn,knbj->nbj", weight, stack[:, self.group, :, g.before].movedim(0, 1))
        into = off.movedim(-1, 0)[g.after, self.group]
        last = torch.nn.functional.one_hot(g.after, self.num_states).to(q)[:, None]
        return (row * torch.where(g.entered[:, None, None], into, last)).sum(-1).log().sum(0)


class _Part:
    """Transitions that share their generator."""

    def __init__(self, gaps: Gaps, where: Tensor, size: int) -> None:
        self.size = size
        self.dt, place = gaps.dt[where].unique(return_inverse=True)
        cell = ((gaps.before[where] * size + gaps.after[where]) * 2 + gaps.entered[where].long()) * len(
            self.dt
        ) + place
        cells, count = cell.unique(return_counts=True)
        self.count = count.double()
        kind, self.gap = cells // len(self.dt), cells % len(self.dt)
        self.entered, pair = (kind % 2).bool(), kind // 2
        self.before, self.after = pair // size, pair % size
        # cells are sorted by kind, so that those of one kind are a slice
        kinds, sizes = kind.unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0)
        self.kinds = [
            (int(k) // 2 // size, int(k) // 2 % size, bool(k % 2), slice(int(e - n), int(e)))
            for k, n, e in zip(kinds, sizes, ends, strict=True)
        ]

    def __call__(self, q: Tensor) -> Tensor:
        """Return log-likelihoods ``(B,)`` of generators ``(B, S, S)``."""
        if q.requires_grad or len(q) == 1:
            return self.count @ self._all(q).log()
        rate = (-q.diagonal(dim1=-2, dim2=-1)).amax(-1)
        order = rate.argsort()
        out, begin = q.new_empty(len(q)), 0
        widest = max(1, _CHUNK // max(len(self.count), 1))
        while begin < len(q):
            reach = int(torch.searchsorted(rate[order], _SPREAD * rate[order[begin]], right=True))
            end = max(begin + 1, min(reach, begin + widest))
            chosen = order[begin:end]
            out[chosen] = self._by_kind(q[chosen])
            begin = end
        return out

    def _all(self, q: Tensor) -> Tensor:
        """Return the probability of every cell ``(cells, B)``, by whole transition matrices: few operations to differentiate."""
        rate = float((-q.detach().diagonal(dim1=-2, dim2=-1)).amax()) or 1.0
        if rate * float(self.dt.max()) > _LONGEST:
            p = _transition(q, self.dt)
        else:
            p = mixture(self.dt * rate, powers(q, rate, float(self.dt.max())).flatten(1))
            p = p.reshape(-1, *q.shape)
        prob = p[self.gap, :, self.before, self.after]
        if bool(self.entered.any()):
            # sum over the states k before the entry: P[i, k] Q[k, d]
            off = q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))
            where = self.entered.nonzero()[:, 0]
            into = p[self.gap[where], :, self.before[where]]
            prob = prob.index_put((where,), (into * off[:, :, self.after[where]].movedim(-1, 0)).sum(-1))
        return prob

    def _by_kind(self, q: Tensor) -> Tensor:
        """Return log-likelihoods of many generators, from the entries alone that were seen."""
        rate = float((-q.diagonal(dim1=-2, dim2=-1)).amax()) or 1.0
        if rate * float(self.dt.max()) > _LONGEST:
            step = max(1, _CHUNK // (len(self.dt) * self.size**2))
            return torch.cat([self.count @ self._all(part).log() for part in q.split(step)])
        stack = powers(q, rate, float(self.dt.max()))
        off = q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))
        total = q.new_zeros(len(q))
        for before, after, entered, cells in self.kinds:
            seen = (stack[:, :, before] * off[:, :, after]).sum(-1) if entered else stack[:, :, before, after]
            total += self.count[cells] @ mixture(self.dt[self.gap[cells]] * rate, seen).log()
        return total


def powers(q: Tensor, rate: float, longest: float) -> Tensor:
    """Return powers of the jump chain ``I + q / rate``, as many as a time ``longest`` needs, ``(K + 1, *q.shape)``."""
    mean = rate * longest
    chain = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + q / rate
    return chain_powers(chain, series_terms(mean, q.shape[-1]))
