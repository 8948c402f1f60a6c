"""Fisher scoring: the score of a panel in the log rates of its links, the information in them, and the climb that uses both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn.jumps.panel import Gaps
from stochdyn.jumps.uniformisation import poisson_weights, series_terms

__all__ = ["PanelScore", "Scored", "climb"]

#: Longest gap, in expected candidate jumps, for which powers of the jump chain are summed; longer ones are halved and squared.
_LONGEST = 64.0
#: Numbers that are held at once.
_CHUNK = 4_000_000
#: So many groups of equal covariates have a product of matrices each; more of them are summed side by side.
_FEW = 8
#: The climb ends when the next step would gain less, in nats, or after so many steps; steps that would gain less than the third
#: number are Newton's.
_GAIN, _STEPS, _NEAR = 1e-16, 300, 1.0
#: Log rates change by no more in one step: far from the maximum the information says little about the way.
_STRIDE = 3.0
#: Added to the scaled information; and the square root of the information on a log rate below which it stays where it is.
_RIDGE, _NOTHING = 1e-9, 1e-3


class Scored(NamedTuple):
    """A log density, its gradient and the information there.

    Attributes:
        value: The log density.
        slope: Its gradient, ``(p,)`` or by group ``(G, r)``.
        information: The Fisher information, ``(p, p)`` or by group ``(G, r, r)``.
    """

    value: float
    slope: Tensor
    information: Tensor


class PanelScore:
    r"""Score and Fisher information of a panel in the log rates of its links.

    Of a visit at which a subject is alive the expected information is taken over all states in which it could have been seen,
    :math:`\sum_j\partial P_{ij}\,\partial P_{ij}^\top/P_{ij}`; an exactly seen entry counts with the square of its own score.

    Args:
        gaps: All transitions between consecutive visits.
        group: The group of equal covariates of every transition, ``(n,)``.
        num_groups: The number of groups G.
        num_states: The number of states S.
        links: The pairs (from, to) whose rates are free, ``(r, 2)``.
        hidden: The states that are never seen at a visit, because their entries are seen exactly.

    Reference:
        Kalbfleisch and Lawless, "The analysis of panel data under a Markov assumption", 1985.
    """

    def __init__(
        self, gaps: Gaps, group: Tensor, num_groups: int, num_states: int, links: Tensor, hidden: list[int]
    ) -> None:
        self.size, self.links, self.num_groups = num_states, links, num_groups
        self.open = torch.ones(num_states, dtype=torch.float64)
        self.open[hidden] = 0.0
        # a slot is one time within one group; slots are sorted by group
        unique_dt, which = gaps.dt.unique(return_inverse=True)
        slots, slot = (group * len(unique_dt) + which).unique(return_inverse=True)
        slot_group, slot_dt = slots // len(unique_dt), unique_dt[slots % len(unique_dt)]
        # dB in the log rate of a link from a to b is its rate times e_a (e_b - e_a)'
        one = torch.eye(num_states, dtype=torch.float64)
        self.turn = one[links[:, 1]] - one[links[:, 0]]
        each = max((1 + len(links)) * num_states**2, len(links) ** 2)
        # with many groups the powers of each are held beside the sums
        chunk = max(1, _CHUNK // each // (1 if num_groups <= _FEW else 64))
        seen = _Cells(slot, gaps.before, gaps.after, ~gaps.entered, num_states)
        entered = _Cells(slot, gaps.before, gaps.after, gaps.entered, num_states)
        self.pieces = []
        for begin in range(0, len(slot_dt), chunk):
            end = min(begin + chunk, len(slot_dt))
            groups, place = slot_group[begin:end].unique(return_inverse=True)
            parts = [
                (cells.within(begin, end, slot_group), entry)
                for cells, entry in ((seen, False), (entered, True))
            ]
            kept = [(part, entry) for part, entry in parts if len(part.slot)]
            self.pieces.append(_Piece(slot_dt[begin:end], groups, place, kept))

    def __call__(self, log_rates: Tensor) -> Scored:
        """Return log-likelihood, score and information of log rates ``(G, r)``, one row for each group."""
        value, num_links = 0.0, len(self.links)
        slope = log_rates.new_zeros(self.num_groups, num_links)
        information = log_rates.new_zeros(self.num_groups, num_links, num_links)
        rates = log_rates.exp()
        for piece in self.pieces:
            p, dp = self._transitions(rates[piece.groups], piece)
            for part, entry in piece.parts:
                # dp has the states before in front of the links
                row, drow, own = p[part.slot, part.before], dp[part.slot, part.before], part.group
                if entry:
                    prob, dprob = self._entries(row, drow, rates[own], part.after)
                else:
                    number = torch.arange(len(row))
                    prob, dprob = row[number, part.after], drow[number, :, part.after]
                value += float(part.number @ prob.log())
                safe = torch.where(prob > 0, prob, torch.ones_like(prob))
                score = dprob / safe[:, None]
                slope.index_add_(0, own, part.number[:, None] * score)
                if entry:
                    factor = part.number.sqrt()[:, None] * score
                    factor = factor[:, None]
                else:
                    # one term for each place from which a subject was seen again, whatever was seen there
                    row, drow, own, seen = row[part.first], drow[part.first], own[part.first], part.total
                    kept = row * self.open
                    weight = seen[:, None] / kept.sum(-1, keepdim=True).clamp(min=1e-300)
                    scale = torch.where(kept > 0, (weight / kept.clamp(min=1e-300)).sqrt(), 0.0)
                    factor = (drow * scale[:, None]).mT
                _add_squares(information, own, factor)
        return Scored(value, slope, information)

    def _entries(self, row: Tensor, drow: Tensor, rates: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities ``(n,)`` of entries, the sum over k of P[i, k] Q[k, d], and their derivatives ``(n, r)``."""
        a, b = self.links[:, 0], self.links[:, 1]
        hits = (b == into[:, None]) * rates
        entering = torch.zeros_like(row).index_add(1, a, hits)
        prob = (row * entering).sum(-1)
        return prob, (drow * entering[:, None]).sum(-1) + hits * row[:, a]

    def _transitions(self, rates: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Return transition matrices ``(m, S, S)`` of slots and their derivatives ``(m, S, r, S)`` in the log rates ``(G, r)``."""
        size, (dt, groups, place) = self.size, piece[:3]
        off = rates.new_zeros(len(groups), size, size)
        off[:, self.links[:, 0], self.links[:, 1]] = rates
        exit_rates = off.sum(-1)
        fastest = exit_rates.amax(-1).clamp(min=1e-300)
        chain = (
            torch.eye(size, dtype=rates.dtype) + (off - torch.diag_embed(exit_rates)) / fastest[:, None, None]
        )
        mean = dt * fastest[place]
        halvings = torch.log2((mean / _LONGEST).clamp(min=1e-300)).ceil().clamp(min=0).long()
        mean = mean / 2.0**halvings
        count = series_terms(float(mean.max()), size)
        weight = poisson_weights(mean, count)
        stack = self._powers(chain, rates / fastest[:, None], count)
        if len(groups) <= _FEW:
            out = rates.new_empty(len(dt), stack.shape[-1])
            for g in range(len(groups)):
                where = (place == g).nonzero()[:, 0]
                out[where] = weight[:, where].mT @ stack[:, g]
        else:
            out = torch.einsum("kn,knx->nx", weight, stack[:, place])
        p, dp = out[:, : size**2].unflatten(1, (size, size)), out[:, size**2 :].unflatten(1, (size, -1, size))
        for k in range(int(halvings.max())):
            long = (halvings > k).nonzero()[:, 0]
            short, slope = p[long], dp[long]
            square = short @ short
            p[long] = square / square.sum(-1, keepdim=True)
            # D P + P D, the links as further rows or columns of one product
            after = (slope.flatten(1, 2) @ short).view_as(slope)
            dp[long] = after + (short @ slope.flatten(2)).view_as(slope)
        return p, dp

    def _powers(self, chain: Tensor, rates: Tensor, count: int) -> Tensor:
        r"""Return the powers ``0, ..., count - 1`` of ``chain (G, S, S)`` and their derivatives, ``(count, G, S S + S r S)``.

        From one power to the next, :math:`d(B^{k+1})=(dB^k)B+B^k\,dB`: one product for all links, and dB has one row.
        """
        size, start = self.size, self.links[:, 0]
        power = torch.eye(size, dtype=chain.dtype).expand_as(chain)
        out = chain.new_zeros(count, len(chain), size * size + size * len(start) * size)
        turn = rates[:, None, :, None] * self.turn
        slope = out[0, :, size**2 :].unflatten(1, (size, -1, size))
        out[0, :, : size**2] = power.flatten(1)
        for k in range(1, count):
            slope = (slope.flatten(1, 2) @ chain).view_as(slope) + power[..., start, None] * turn
            power = power @ chain
            out[k, :, : size**2], out[k, :, size**2 :] = power.flatten(1), slope.flatten(1)
        return out


class _Part(NamedTuple):
    slot: Tensor
    group: Tensor
    before: Tensor
    after: Tensor
    number: Tensor
    first: Tensor
    total: Tensor


class _Cells:
    """Counts of equal transitions, sorted by slot and state before."""

    def __init__(self, slot: Tensor, before: Tensor, after: Tensor, which: Tensor, size: int) -> None:
        code = ((slot * size + before) * size + after)[which]
        cells, count = code.unique(return_counts=True)
        self.size = size
        self.slot, self.before, self.after = cells // size**2, cells // size % size, cells % size
        self.count = count.double()

    def within(self, begin: int, end: int, slot_group: Tensor) -> _Part:
        """Return the cells of some slots, numbered from the first of these."""
        low, high = torch.searchsorted(self.slot, torch.tensor([begin, end])).tolist()
        slot, before = self.slot[low:high] - begin, self.before[low:high]
        count = self.count[low:high]
        place = slot * self.size + before
        _, of, sizes = place.unique_consecutive(return_inverse=True, return_counts=True)
        total = count.new_zeros(len(sizes)).index_add(0, of, count)
        group = slot_group[self.slot[low:high]]
        return _Part(slot, group, before, self.after[low:high], count, sizes.cumsum(0) - sizes, total)


class _Piece(NamedTuple):
    """Slots that are computed at once: their times, groups, which of these is whose, and what was seen in them."""

    dt: Tensor
    groups: Tensor
    place: Tensor
    parts: list[tuple[_Part, bool]]


def _add_squares(information: Tensor, group: Tensor, factor: Tensor) -> None:
    """Add ``sum over rows of factor (n, m, r)`` of their outer squares to the information of their groups."""
    groups, sizes = group.unique_consecutive(return_counts=True)
    if len(groups) > _FEW:
        information.index_add_(0, group, factor.mT @ factor)
        return
    for g, part in zip(groups.tolist(), factor.split(sizes.tolist()), strict=True):
        flat = part.flatten(0, 1)
        information[g] += flat.mT @ flat


def climb(
    scored: Callable[[Tensor], Scored],
    curvature: Callable[[Tensor], Tensor],
    start: Tensor,
    moved: Tensor,
    reach: float,
) -> Tensor:
    r"""Return the maximum of a log density by damped Fisher scoring, from a start.

    A step is :math:`(M+\mu\,\mathrm{diag}\,M)^{-1}s` with the score s and the information M; the damping μ grows tenfold where a step
    leads down, and shrinks tenfold where it leads up. Near the maximum M gives way to minus the Hessian there, scaled as M is: the
    steps then become Newton's. The climb ends where the next step would gain less than 1e-16 nats, whatever the units.

    Args:
        scored: The log density with score and information at parameters ``(p,)``.
        curvature: Minus the Hessian of the log density at parameters ``(p,)``.
        start: The parameters to start from, ``(p,)``.
        moved: How log rates change with the parameters, ``(m, p)``: none of them moves by more than 3 in a step, in effect of one parameter.
        reach: The largest distance of a parameter from the start: where a density has no maximum the climb ends there.
    """
    theta, here, damping, last = start, scored(start), 0.0, math.inf
    eye = torch.eye(len(theta), dtype=theta.dtype)
    stride = _STRIDE / moved.abs().amax(0).clamp(min=1e-300)
    observed: Tensor | None = None
    for _ in range(_STEPS):
        scale = here.information.diagonal().clamp(min=0.0).sqrt()
        # what the data say nothing of any more stays, and so does what would leave its bounds
        silent = (scale < _NOTHING) & (here.slope.abs() < _NOTHING**2)
        stuck = ((theta >= start + reach) & (here.slope > 0)) | ((theta <= start - reach) & (here.slope < 0))
        free = (~silent & ~stuck).to(theta)
        scale = torch.where(free * scale > 0, scale, 1.0)
        outside = torch.diag(1.0 - free) + _RIDGE * eye
        scaled = here.information / scale[:, None] / scale if observed is None else observed
        scaled = scaled * free[:, None] * free + outside
        slope = here.slope / scale * free
        newton = torch.linalg.solve(scaled, slope)
        gain = 0.5 * float(slope @ newton)
        if gain < _GAIN:
            return torch.minimum(torch.maximum(theta + newton / scale, start - reach), start + reach)
        # minus the Hessian serves until the steps with it gain little on each other
        if gain < _NEAR and gain > 0.05 * last:
            found = curvature(theta) / scale[:, None] / scale * free[:, None] * free
            # only where it bends down in every direction is there a maximum to go to
            if float(torch.linalg.eigvalsh(found + outside).amin()) > 0.01:
                observed, scaled = found, found + outside
                newton = torch.linalg.solve(scaled, slope)
        last = gain
        step = (torch.linalg.solve(scaled + damping * eye, slope) if damping else newton) / scale
        step = torch.minimum(torch.maximum(step, -stride), stride)
        trial = torch.minimum(torch.maximum(theta + step, start - reach), start + reach)
        there = scored(trial)
        # sums of logs are known to some 1e-13 of their size
        if there.value >= here.value - 1e-13 * abs(here.value):
            theta, here, damping = trial, there, damping / 10 if damping > 1e-6 else 0.0
        elif damping > 1e12:
            break
        else:
            damping = max(10 * damping, 1e-3)
    return theta
