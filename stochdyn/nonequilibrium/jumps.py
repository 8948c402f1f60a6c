"""Entropy production of jump processes: cycles, large deviations, bounds, hidden states, and estimates from counted jumps."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import DOUBLE, as_tensor
from stochdyn.core.law.path import Estimate
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError

__all__ = [
    "Cycle",
    "SteadyRates",
    "VisibleEntropy",
    "cycle_affinities",
    "entropy_from_counts",
    "scgf",
    "short_time_bound",
    "visible_entropy_production",
]


@runtime_checkable
class SteadyRates(Protocol):
    """What is asked of the generator of a jump process, such as a :class:`stochdyn.jumps.RateMatrix`."""

    @property
    def matrix(self) -> Tensor:
        """The generator, ``(*batch, S, S)``, with rates from the row's state to the column's."""

    def stationary(self) -> Tensor:
        """Return the stationary law, ``(*batch, S)``."""


@runtime_checkable
class CountedJumps(Protocol):
    """What is asked of a record of jumps, such as a :class:`stochdyn.jumps.JumpRecord`."""

    @property
    def counts(self) -> Tensor:
        """The numbers of jumps from the row's state to the column's, ``(*shape, S, S)``."""

    @property
    def ts(self) -> Tensor:
        """Times whose ends are those of the record, unless it has a ``duration``."""


@runtime_checkable
class _Timed(Protocol):
    """A record that was counted for longer than its grid, such as a :class:`stochdyn.jumps.JumpRecord` on a late grid."""

    @property
    def duration(self) -> float:
        """The time over which jumps were counted."""


def _flow(rates: SteadyRates) -> Tensor:
    """Return the probability per time of each jump in the steady state, ``(*batch, S, S)``."""
    if not isinstance(rates, SteadyRates):
        raise InvalidInputError("rates must be a RateMatrix", got=type(rates).__name__)
    flow = rates.stationary()[..., None] * rates.matrix
    return flow - torch.diag_embed(flow.diagonal(dim1=-2, dim2=-1))


def short_time_bound(rates: SteadyRates) -> Tensor:
    r"""Return the best bound on entropy production that short-time currents give, ``(*batch,)`` in 1/time.

    .. math:: \sum_{i<j}\frac{2J_{ij}^2}{A_{ij}},

    with the net flow J and the traffic A of every edge. It lies below the entropy production rate, and isn't tight for jumps.

    Args:
        rates: The generator, a :class:`stochdyn.jumps.RateMatrix`.
    """
    flow = _flow(rates)
    there, back = _edges(flow)
    traffic = there + back
    safe = torch.where(traffic > 0, traffic, 1.0)
    return torch.where(traffic > 0, 2 * (there - back) ** 2 / safe, 0.0).sum(-1)


def _edges(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries above the diagonal and their mirror images, ``(*batch, E)`` each."""
    upper = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], 1, device=matrix.device)
    return matrix[..., upper[0], upper[1]], matrix[..., upper[1], upper[0]]


@dataclass(frozen=True)
class Cycle:
    r"""One of the independent cycles of a graph of states.

    Attributes:
        states: The states in the order in which the cycle visits them; from the last it goes back to the first.
        affinity: The entropy produced per round, :math:`\log\prod Q_{ij}/Q_{ji}`; infinite where a jump has no reverse.
        current: The net number of rounds per time in the steady state, counted on the jump from the last state to the first.
    """

    states: tuple[int, ...]
    affinity: float
    current: float


def cycle_affinities(rates: SteadyRates) -> list[Cycle]:
    r"""Return a set of independent cycles with their affinities and currents.

    The entropy production rate is :math:`\sigma=\sum_cJ_cA_c` over any such set; each cycle here is an edge outside a spanning tree of the
    graph, closed through the tree. In detailed balance every affinity is zero.

    Args:
        rates: The generator of one process, a :class:`stochdyn.jumps.RateMatrix` without a batch.

    Raises:
        ShapeError: If there is a batch of generators.

    Reference:
        J. Schnakenberg, "Network theory of microscopic and macroscopic behavior of master equation systems", 1976.
    """
    flow = _flow(rates).detach().double()
    if flow.ndim != 2:
        raise ShapeError("one generator at a time", got=f"batch {tuple(flow.shape[:-2])}")
    q = rates.matrix.detach().double()
    linked = ((q > 0) | (q.mT > 0)).numpy()
    parent: dict[int, int] = {0: 0}
    order = [0]
    for i in order:  # breadth first, so that cycles are short
        for j in np.flatnonzero(linked[i]).tolist():
            if j != i and j not in parent:
                parent[j] = i
                order.append(j)
    cycles = []
    for i in range(len(q)):
        for j in range(i + 1, len(q)):
            if linked[i, j] and i in parent and parent[i] != j and parent[j] != i:
                first, second = _to_root(i, parent), _to_root(j, parent)
                common = next(state for state in first if state in second)
                back = second[: second.index(common) + 1]
                # from j through the tree to i; the edge from i to j closes the cycle
                states = (*back, *reversed(first[: first.index(common)]))
                ring = [*states, states[0]]
                affinity = sum(_log_ratio(q, a, b) for a, b in itertools.pairwise(ring))
                current = float(flow[i, j] - flow[j, i])
                cycles.append(Cycle(states, affinity, current))
    return cycles


def _to_root(state: int, parent: dict[int, int]) -> list[int]:
    path = [state]
    while parent[path[-1]] != path[-1]:
        path.append(parent[path[-1]])
    return path


def _log_ratio(q: Tensor, i: int, j: int) -> float:
    there, back = float(q[i, j]), float(q[j, i])
    if there == 0 or back == 0:
        return math.inf if back == 0 else -math.inf
    return math.log(there / back)


def scgf(rates: SteadyRates, counting_field: object) -> Tensor:
    r"""Return the scaled cumulant generating function of entropy production, its large deviations.

    .. math:: \psi(\lambda)=\lim_{T\to\infty}\frac1T\log E[e^{-\lambda S_T}],

    the largest eigenvalue of the generator with rates :math:`Q_{ij}^{1-\lambda}Q_{ji}^{\lambda}` off the diagonal. It has the
    symmetry :math:`\psi(\lambda)=\psi(1-\lambda)` of the fluctuation theorem, :math:`-\psi'(0)` is the entropy production rate and
    :math:`\psi''(0)` its variance rate; both are derivatives by automatic differentiation.

    Args:
        rates: The generator, a :class:`stochdyn.jumps.RateMatrix`, with a reverse for every jump.
        counting_field: The values of :math:`\lambda`, any shape that broadcasts with the batch of generators.

    Returns:
        The function in 1/time, of the shape of the values and the batch together.

    Raises:
        InvalidInputError: If a jump has no reverse, so that entropy production is infinite.
    """
    _flow(rates)
    q = rates.matrix.double()
    field = (
        counting_field if isinstance(counting_field, Tensor) else as_tensor(counting_field, "counting_field")
    )
    field = field.to(q)[..., None, None]
    linked = q > 0
    if bool((linked != linked.mT).any()):
        raise InvalidInputError("a jump has no reverse, so entropy production is infinite")
    log = torch.where(linked, q, 1.0).log()
    off = torch.where(linked, ((1 - field) * log + field * log.mT).exp(), 0.0)
    tilted = off + torch.diag_embed(q.diagonal(dim1=-2, dim2=-1)).expand_as(off)
    # The largest eigenvalue is real and simple (Perron and Frobenius).
    values = torch.linalg.eigvals(tilted).real
    return values.amax(-1)


@dataclass(frozen=True)
class VisibleEntropy:
    """The entropy production that an observer sees to whom some states look the same.

    Attributes:
        rate: What the visible trajectory, waiting times included, produces per time; never more than the true rate.
        affinity: The part that the order of visible states alone shows.
    """

    rate: float
    affinity: float


def visible_entropy_production(
    rates: SteadyRates, hidden: Sequence[int], num_nodes: int = 400
) -> VisibleEntropy:
    r"""Return the entropy production rate of the visible trajectory when some states can't be told from each other.

    With the hidden states in H, an excursion from i through H to k has the density
    :math:`F_{ik}(t)=Q_{iH}e^{Q_{HH}t}Q_{Hk}` of its length, and

    .. math:: \sigma_{vis}=\sum_{i<k}J_{ik}\log\frac{Q_{ik}}{Q_{ki}}+\sum_{i\ne k}\pi_i\int F_{ik}\log\frac{F_{ik}}{F_{ki}}\,dt

    over the states outside H. The order of states alone has the integrals of F in place of F, and sees less.

    Args:
        rates: The generator of one process, a :class:`stochdyn.jumps.RateMatrix` without a batch.
        hidden: The states that look the same, two or more.
        num_nodes: The number of nodes of the quadrature over the length of an excursion.

    Raises:
        InvalidInputError: If the hidden states aren't states, or leave nothing visible.

    Reference:
        I. Martínez et al., "Inferring broken detailed balance in the absence of observable currents", 2019.
    """
    flow = _flow(rates).detach().double()
    if flow.ndim != 2:
        raise ShapeError("one generator at a time", got=f"batch {tuple(flow.shape[:-2])}")
    size = len(flow)
    inside = sorted({int(i) for i in hidden})
    if not inside or inside[0] < 0 or inside[-1] >= size or len(inside) > size - 1:
        raise InvalidInputError("hidden must name states and leave others visible", got=list(hidden)[:8])
    q, pi = rates.matrix.detach().double(), rates.stationary().detach().double()
    seen = [i for i in range(size) if i not in inside]
    enter, leave = q[seen][:, inside], q[inside][:, seen]
    core = q[inside][:, inside]
    there, back = _edges(flow[seen][:, seen])
    direct = float(_directed(there, back).sum())
    # With the law of the state before it as a factor in both logarithms, which changes nothing in the sum.
    weight = pi[seen][:, None]
    total = enter @ torch.linalg.solve(-core, leave)
    affinity = float(_log_gain(weight * total).sum())
    # Lengths of excursions on t = -log(1 - u) / slowest rate, by Gauss and Legendre in u.
    slowest = float(-torch.linalg.eigvals(core).real.max())
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    u = torch.as_tensor(0.5 * (nodes + 1))
    t = -torch.log1p(-u) / slowest
    density = enter @ torch.linalg.matrix_exp(core * t[:, None, None]) @ leave
    measure = torch.as_tensor(0.5 * weights) / (slowest * (1 - u))
    timed = float((measure[:, None, None] * _log_gain(weight * density)).sum())
    return VisibleEntropy(direct + timed, direct + affinity)


def _directed(there: Tensor, back: Tensor) -> Tensor:
    """Return ``(a - b) log(a / b)`` by edge, zero where neither exists and infinite where one doesn't."""
    both = (there > 0) & (back > 0)
    ratio = torch.where(both, there, 1.0).log() - torch.where(both, back, 1.0).log()
    return torch.where((there > 0) == (back > 0), (there - back) * ratio, math.inf)


def _log_gain(f: Tensor) -> Tensor:
    """Return ``f log(f / fᵀ)`` by pair, zero where there is nothing."""
    there = f > 0
    ratio = torch.where(there, f, 1.0).log() - torch.where(f.mT > 0, f.mT, 1.0).log()
    return torch.where(there & (f.mT > 0), f * ratio, torch.where(there, math.inf, 0.0))


def entropy_from_counts(record: CountedJumps) -> Estimate:
    r"""Estimate the entropy production rate from the jumps of long records.

    .. math:: \hat\sigma=\frac1T\sum_{i<j}(n_{ij}-n_{ji})\log\frac{n_{ij}+1/2}{n_{ji}+1/2}

    The half counts keep one-way links finite. The estimate is biased upwards for short records, and misses what goes on among states that
    the record can't tell apart (:func:`visible_entropy_production`).

    Args:
        record: A record with ``counts (*shape, S, S)`` and ``ts``; several are averaged, with the error of their mean.

    Returns:
        The mean and its standard error; for a single record the error follows from counting.

    Raises:
        ShapeError: If the counts aren't matrices.

    Warns:
        ApproximationWarning: If a link was seen in one direction only: its part is then set by the half counts, not by the data.
    """
    if not isinstance(record, CountedJumps):
        raise InvalidInputError(
            "record must be a record of jumps, with counts and ts", got=type(record).__name__
        )
    counts = as_tensor(record.counts, "record.counts", like=DOUBLE).double()
    if counts.ndim < 2:
        raise ShapeError("counts must be (*shape, S, S)", got=tuple(counts.shape))
    span = record.duration if isinstance(record, _Timed) else float(record.ts[-1] - record.ts[0])
    there, back = _edges(counts)
    one_way = int((((there == 0) != (back == 0)) & (there + back > 5)).sum())
    if one_way:
        warnings.warn(
            f"{one_way} links were seen in one direction only, so their entropy production is only known to be large. "
            "Take longer records.",
            ApproximationWarning,
            stacklevel=2,
        )
    log_ratio = torch.log((there + 0.5) / (back + 0.5))
    rate = ((there - back) * log_ratio).sum(-1) / span
    if rate.numel() > 1:
        return Estimate.of(rate.reshape(-1))
    # A number of jumps has the variance of its mean; a jump more changes the sum by the log-ratio and by 1 - n_ji / n_ij.
    slope_there = log_ratio + (there - back) / (there + 0.5)
    slope_back = -log_ratio - (there - back) / (back + 0.5)
    error = (there * slope_there**2 + back * slope_back**2).sum(-1).sqrt() / span
    return Estimate(rate.reshape(()), error.reshape(()))
