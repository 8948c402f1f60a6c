"""Simulation of reaction networks in lanes: the direct method, next reactions, and tau-leaping."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_real, check_type
from stochdyn.errors import InvalidInputError

#: A reaction is critical if so many of it would use up a species.
_NEAR = 10

__all__ = ["Direct", "Lanes", "NextReaction", "SimulationMethod", "TauLeaping", "as_simulation"]


class Lanes(NamedTuple):
    """What a simulation needs of a network.

    Attributes:
        unit: Propensities ``(L, R)`` of counts ``(L, M)`` at rate constants of one.
        change: What each reaction adds, ``(R, M)``.
        constants: The rate constants ``(R,)``, or ``(L, R)`` where each lane has its own.
    """

    unit: Callable[[Tensor], Tensor]
    change: Tensor
    constants: Tensor

    def at(self, x: Tensor, which: Tensor) -> Tensor:
        """Return the propensities of the lanes ``which`` at counts ``x``.

        Raises:
            InvalidInputError: If one is negative.
        """
        constants = self.constants if self.constants.ndim == 1 else self.constants[which]
        a = constants * self.unit(x)
        if bool((a < 0).any()):
            raise InvalidInputError("a propensity is negative", got=float(a.min()))
        return a


class SimulationMethod(ABC):
    """How paths of a reaction network are simulated."""

    @abstractmethod
    def paths(
        self, lanes: Lanes, x: Tensor, start: float, grid: Tensor, source: torch.Generator | None
    ) -> Tensor:
        """Return counts ``(L, T, M)`` at the times of the grid.

        Args:
            lanes: The network.
            x: The counts at the start, ``(L, M)``.
            start: The time of the start.
            grid: The times ``(T,)``.
            source: The source of randomness.
        """


class _Writer:
    """Counts at the times of the grid, written as lanes pass them."""

    def __init__(self, x: Tensor, grid: Tensor) -> None:
        self.out = torch.empty(len(x), len(grid), x.shape[1], dtype=torch.float64)
        self.place = torch.zeros(len(x), dtype=torch.long)
        self.padded = torch.cat([grid, grid.new_tensor([math.inf])])
        self.num_times = len(grid)

    def next_time(self, who: Tensor) -> Tensor:
        """Return the next time of the grid of lanes, infinite past the last."""
        return self.padded[self.place[who]]

    def write(self, who: Tensor, x: Tensor, until: Tensor) -> Tensor:
        """Write the counts of lanes at all times before ``until``; return which lanes are done."""
        while True:
            due = self.padded[self.place[who]] < until
            if not bool(due.any()):
                return self.place[who] >= self.num_times
            lanes = who[due]
            self.out[lanes, self.place[lanes]] = x[due]
            self.place[lanes] += 1


class Direct(SimulationMethod):
    """Gillespie's direct method: an exponential wait of the total rate, then one of the reactions in proportion to its rate.

    Exact. Use it unless counts are so large that paths hold very many reactions.

    Reference:
        Gillespie, "Exact stochastic simulation of coupled chemical reactions", 1977.
    """

    def paths(
        self, lanes: Lanes, x: Tensor, start: float, grid: Tensor, source: torch.Generator | None
    ) -> Tensor:
        """Return counts at the times of the grid."""
        state, writer = x.clone(), _Writer(x, grid)
        now = torch.full((len(x),), start, dtype=torch.float64)
        active = torch.arange(len(x))
        while len(active):
            here = state[active]
            cumulative = lanes.at(here, active).cumsum(-1)
            total = cumulative[:, -1]
            wait = -torch.log1p(-torch.rand(len(active), dtype=torch.float64, generator=source)) / total
            later = torch.where(total > 0, now[active] + wait, torch.full_like(wait, math.inf))
            done = writer.write(active, here, later)
            pick = torch.rand(len(active), dtype=torch.float64, generator=source) * total
            reaction = torch.searchsorted(cumulative, pick[:, None], right=True)[:, 0]
            reaction = reaction.clamp(max=len(lanes.change) - 1)
            state[active] = torch.where(done[:, None], here, here + lanes.change[reaction])
            now[active] = later
            active = active[~done]
        return writer.out


class NextReaction(SimulationMethod):
    r"""The modified next reaction method: every reaction is a Poisson process in an internal time of its own.

    That time is :math:`\int a_r\,dt`, in which the process has unit rate. Exact, with one random number per reaction. Use it
    where paths of two parameter values shall share their randomness.

    Reference:
        Anderson, "A modified next reaction method for simulating chemical systems with time dependent propensities and
        delays", 2007.
    """

    def paths(
        self, lanes: Lanes, x: Tensor, start: float, grid: Tensor, source: torch.Generator | None
    ) -> Tensor:
        """Return counts at the times of the grid."""
        state, writer, count = x.clone(), _Writer(x, grid), len(lanes.change)
        now = torch.full((len(x),), start, dtype=torch.float64)
        elapsed = torch.zeros(len(x), count, dtype=torch.float64)
        firing = -torch.log1p(-torch.rand(len(x), count, dtype=torch.float64, generator=source))
        active = torch.arange(len(x))
        while len(active):
            here = state[active]
            a = lanes.at(here, active)
            left = firing[active] - elapsed[active]
            wait = torch.where(a > 0, left / torch.where(a > 0, a, 1.0), torch.full_like(a, math.inf))
            step, reaction = wait.min(-1)
            later = now[active] + step
            done = writer.write(active, here, later)
            active, a, step, reaction = active[~done], a[~done], step[~done], reaction[~done]
            if not len(active):
                break
            elapsed[active] += a * step[:, None]
            fresh = -torch.log1p(-torch.rand(len(active), dtype=torch.float64, generator=source))
            # the reaction that fired has reached its internal time exactly
            elapsed[active, reaction] = firing[active, reaction]
            firing[active, reaction] += fresh
            state[active] += lanes.change[reaction]
            now[active] = later[~done]
        return writer.out


@dataclass(frozen=True)
class TauLeaping(SimulationMethod):
    r"""Leaps over many reactions at once, each happening a Poisson number of times at the rate that it has at the start of the leap.

    The bias is of first order in the length of the leaps. Reactions that could use up a species within ten of them happen one at
    a time; a leap that would still make a count negative is halved. Use it where counts are in the hundreds and more, and
    check against the direct method on a shorter time.

    Args:
        epsilon: How much counts may change during a leap, relative to a third of themselves; leaps are as long as that allows.
        dt: The length of leaps, instead of ``epsilon``.

    Reference:
        Cao, Gillespie and Petzold, "Efficient step size selection for the tau-leaping simulation method", 2006.
    """

    epsilon: float = 0.03
    dt: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_real(self.epsilon, "epsilon", above=0.0)
        if self.dt is not None:
            check_real(self.dt, "dt", above=0.0)

    def paths(
        self, lanes: Lanes, x: Tensor, start: float, grid: Tensor, source: torch.Generator | None
    ) -> Tensor:
        """Return counts at the times of the grid."""
        state, writer = x.clone(), _Writer(x, grid)
        now = torch.full((len(x),), start, dtype=torch.float64)
        active = torch.arange(len(x))
        active = active[~writer.write(active, state, now)]
        while len(active):
            here, goal = state[active], writer.next_time(active)
            a = lanes.at(here, active)
            critical = (a > 0) & (here[:, None, :] + _NEAR * lanes.change < 0).any(-1)
            calm = torch.where(critical, torch.zeros_like(a), a)
            tau = torch.minimum(self._leap(calm, here, lanes.change), goal - now[active])
            # critical reactions happen one at a time: the wait for the first of them bounds the leap
            urgent = (a - calm).cumsum(-1)
            total = urgent[:, -1]
            wait = -torch.log1p(-torch.rand(len(active), dtype=torch.float64, generator=source)) / total
            pick = torch.rand(len(active), dtype=torch.float64, generator=source) * total
            which = torch.searchsorted(urgent, pick[:, None], right=True)[:, 0].clamp(max=a.shape[1] - 1)
            one = torch.where((total > 0)[:, None], lanes.change[which], torch.zeros_like(here))
            fires = (total > 0) & (wait <= tau)
            tau = torch.where(fires, wait, tau)
            change = torch.poisson(calm * tau[:, None], generator=source) @ lanes.change
            bad = (here + change < 0).any(-1)
            while bool(bad.any()):
                tau[bad] *= 0.5
                fires &= ~bad
                change[bad] = torch.poisson(calm[bad] * tau[bad, None], generator=source) @ lanes.change
                bad = (here + change < 0).any(-1)
            change = change + torch.where(fires[:, None], one, torch.zeros_like(one))
            arrived = tau >= goal - now[active]
            state[active] = here + change
            now[active] = torch.where(arrived, goal, now[active] + tau)
            # counts at the grid are written when a lane arrives
            just = active[arrived]
            if len(just):
                writer.out[just, writer.place[just]] = state[just]
                writer.place[just] += 1
            active = active[writer.place[active] < writer.num_times]
        return writer.out

    def _leap(self, a: Tensor, x: Tensor, change: Tensor) -> Tensor:
        """Return lengths of leaps ``(L,)``."""
        if self.dt is not None:
            return torch.full((len(x),), self.dt, dtype=torch.float64)
        # counts may change by at most max(epsilon x / 3, 1) in mean and standard deviation (their eq. 33; order up to three)
        mean, variance = a @ change, a @ change.square()
        allowed = (self.epsilon * x / 3.0).clamp(min=1.0)
        tau = torch.minimum(allowed / mean.abs().clamp(min=1e-300), allowed**2 / variance.clamp(min=1e-300))
        return tau.amin(-1)


def as_simulation(method: SimulationMethod | str) -> SimulationMethod:
    """Return a method by its name, or as it is."""
    if isinstance(method, str):
        check_choice(method, ("direct", "next_reaction", "tau"), "method")
        return {"direct": Direct, "next_reaction": NextReaction, "tau": TauLeaping}[method]()
    check_type(method, SimulationMethod, "method")
    return method
