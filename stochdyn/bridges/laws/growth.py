r"""Populations whose pairs of particles gain and lose weight on the way: what a coupling says between two snapshots.

A coupling :math:`P_{ab}` that doesn't have the snapshots for marginals leaves the difference to births and deaths. Spread over the
interval, they give the pair the weight

.. math:: q_t(a,b)\propto P_{ab}\,e^{\alpha_a(t)+\beta_b(t)}

whose first marginal at the start, and second one at the end, are the snapshots' own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.core.transport.entropic import TransportPlan

__all__ = ["Births", "Coupling", "Growth", "TiltedCoupling"]

# Times in an interval at which the weights of pairs are exact; between them they are linear.
_NODES = 17


class Coupling(Protocol):
    """Weights of pairs, in blocks of rows."""

    @property
    def shape(self) -> torch.Size:
        """``(n, m)``."""

    @property
    def mass(self) -> Tensor:
        """The sum of all weights."""

    def plan(self) -> Tensor:
        """Return all weights ``(n, m)``."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their weights."""


@dataclass(frozen=True)
class TiltedCoupling:
    r"""The weights :math:`P_{ab}\sum_j e^{\alpha_{ja}+\beta_{jb}}` of pairs.

    Attributes:
        base: The coupling :math:`P` that is tilted.
        rows: The log factors :math:`\alpha` of the rows, ``(J, n)``.
        columns: The log factors :math:`\beta` of the columns, ``(J, m)``.
    """

    base: TransportPlan
    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> torch.Size:
        """``(n, m)``."""
        return self.base.shape

    @property
    def mass(self) -> Tensor:
        """The sum of all weights."""
        return torch.stack([block.double().sum() for _, block in self.blocks()]).sum()

    def plan(self) -> Tensor:
        """Return all weights ``(n, m)``."""
        return torch.cat([block for _, block in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their weights."""
        left, right = self.rows.exp(), self.columns.exp()
        for rows, block in self.base.blocks():
            yield rows, (block.double() * (left[:, rows].mT @ right)).to(block.dtype)


@dataclass(frozen=True)
class Births:
    """Paths that go on as those of other pairs, after a death and a birth.

    Attributes:
        path: The indices of the paths, ``(k,)``.
        share: The times of death and birth, ``(k,)``, as shares of the interval.
        first: The first particles of the new pairs, ``(k,)``.
        second: The second particles of the new pairs, ``(k,)``.
    """

    path: Tensor
    share: Tensor
    first: Tensor
    second: Tensor


class Growth:
    r"""How the weights of the pairs of one coupling change over its interval.

    Args:
        plan: The coupling :math:`P`.
        rows: The log factors :math:`\alpha` of the rows, ``(K+1, n)`` at ``K + 1`` equally spaced times.
        columns: The log factors :math:`\beta` of the columns, ``(K+1, m)``.
        log_mass: The log of the factor by which the whole population grows, or grows beyond what absolute factors say.
        absolute: Whether the factors say how much the whole population grows, and not only who grows more than others.
    """

    def __init__(
        self,
        plan: TransportPlan,
        rows: Tensor,
        columns: Tensor,
        log_mass: float = 0.0,
        absolute: bool = False,
    ) -> None:
        self.plan, self.log_mass = plan, log_mass
        rows, columns = rows.double(), columns.double()
        given = (rows, columns)
        rows, columns = rows - rows.amax(1, keepdim=True), columns - columns.amax(1, keepdim=True)
        # normalising constants sum_ab P_ab exp(alpha_a + beta_b) at every node, by blocks of rows
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        self.row_sums = torch.zeros_like(rows)
        for own, block in plan.blocks():
            part = (block.double() @ columns.exp().mT).mT * rows[:, own].exp()
            self.row_sums[:, own] = part
            total += part.sum(1)
        self.rows, self.columns = rows - total.log()[:, None], columns
        self.row_sums /= total[:, None]
        self._growing = given if absolute else (self.rows, self.columns)

    @staticmethod
    def even(plan: TransportPlan, first: Tensor, second: Tensor, log_mass: float = 0.0) -> Growth:
        r"""Return the growth at an even rate along each pair, from weights ``first (n,)`` to ``second (m,)``.

        .. math:: \alpha_a(t)=(1-s)\log\frac{\pi_a}{\sum_bP_{ab}},\qquad
            \beta_b(t)=s\log\frac{\pi_b}{\sum_aP_{ab}},\qquad s=\frac{t-t_i}{t_{i+1}-t_i}
        """
        share = torch.linspace(0, 1, _NODES, dtype=torch.float64, device=first.device)[:, None]
        log_rows, log_columns = log_shortfall(plan, first, second)
        return Growth(plan, (1 - share) * log_rows, share * log_columns, log_mass)

    def coupling(self, share: float) -> TiltedCoupling:
        """Return the weights of pairs at a share of the interval."""
        k, rest = self._place(share)
        rows, columns = self.rows[k : k + 2], self.columns[k : k + 2]
        if not rest:
            return TiltedCoupling(self.plan, rows[:1], columns[:1])
        # between nodes weights are linear: the mixture of the two tilted couplings
        parts = torch.tensor([[1 - rest], [rest]], dtype=rows.dtype, device=rows.device).log()
        return TiltedCoupling(self.plan, rows + parts, columns)

    def tilts(self, share: float) -> tuple[Tensor, Tensor]:
        """Return the log factors ``(n,)`` and ``(m,)`` at a share of the interval."""
        k, rest = self._place(share)
        pairs = (self.rows[k : k + 2], self.columns[k : k + 2])
        first, second = ((1 - rest) * p[0] + rest * p[-1] for p in pairs)
        return first, second

    def rates(self, share: float) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the log factors in the share, ``(n,)`` and ``(m,)``."""
        k = min(int(share * (len(self.rows) - 1)), len(self.rows) - 2)
        width = 1.0 / (len(self.rows) - 1)
        first, second = ((p[k + 1] - p[k]) / width for p in self._growing)
        return first + self.log_mass, second

    def _place(self, share: float) -> tuple[int, float]:
        place = min(max(share, 0.0), 1.0) * (len(self.rows) - 1)
        return int(place), place - int(place)

    def partners(self, first: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        """Draw the second particles of pairs ``(n,)`` at node ``k``, from the first ones."""
        weight = self.plan.rows(first).double() * self.columns[k].exp()
        reach = weight.cumsum(-1)
        point = torch.rand(len(first), 1, generator=generator, dtype=torch.float64, device=reach.device)
        found = torch.searchsorted(reach, point * reach[:, -1:], right=True).squeeze(-1)
        return found.clamp_max(reach.shape[-1] - 1)

    def run(self, first: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, list[Births]]:
        r"""Draw pairs for paths that start at ``first (n,)``, and their deaths and births.

        From one node to the next a path keeps its pair with probability :math:`\min(1,q_{k+1}/q_k)`; else it dies at an even chance of
        time and goes on from a pair of :math:`(q_{k+1}-q_k)_+`. So the pairs have the law :math:`q` at every time.
        """
        a, b = first.clone(), self.partners(first, 0, generator)
        start, births = b.clone(), []
        for k in range(len(self.rows) - 1):
            # log q_{k+1} / q_k of each path's pair; it dies with probability 1 - q_{k+1} / q_k where the pair loses weight
            change = (self.rows[k + 1] - self.rows[k])[a] + (self.columns[k + 1] - self.columns[k])[b]
            uniform = torch.rand(len(a), generator=generator, dtype=torch.float64, device=a.device)
            dead = (uniform > change.exp()).nonzero()[:, 0]
            if not len(dead):
                continue
            when = torch.rand(len(dead), generator=generator, dtype=torch.float64, device=a.device)
            own_a, own_b = self._newborn(k, len(dead), generator)
            a[dead], b[dead] = own_a, own_b
            births.append(Births(dead, (k + when) / (len(self.rows) - 1), own_a, own_b))
        return start, b, births

    def _newborn(self, k: int, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw pairs by what they gain from node ``k`` to the next."""

        def gained(block: Tensor, rows: slice | Tensor) -> Tensor:
            old, new = (self.rows[j, rows, None].exp() * self.columns[j].exp() for j in (k, k + 1))
            return block.double() * (new - old).clamp_min(0)

        gains = torch.cat([gained(block, rows).sum(1) for rows, block in self.plan.blocks()])
        a = draw_index(gains, count, generator)
        # rows of the plan are known up to a factor each, which doesn't change who is drawn from one
        reach = gained(self.plan.rows(a), a).cumsum(-1)
        point = torch.rand(count, 1, generator=generator, dtype=torch.float64, device=a.device)
        b = torch.searchsorted(reach, point * reach[:, -1:], right=True).squeeze(-1)
        return a, b.clamp_max(reach.shape[-1] - 1)


def log_shortfall(plan: TransportPlan, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of weights ``(n,)`` and ``(m,)`` over the plan's marginals."""
    columns = torch.zeros(second.shape, dtype=torch.float64, device=second.device)
    rows = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for own, block in plan.blocks():
        rows[own] = block.double().sum(1)
        columns += block.double().sum(0)
    tiny = torch.finfo(torch.float64).tiny
    rows, columns = rows / rows.sum(), columns / columns.sum()
    first, second = first.double().clamp_min(tiny).log(), second.double().clamp_min(tiny).log()
    return first - rows.clamp_min(tiny).log(), second - columns.clamp_min(tiny).log()
