"""Weighted nodes that stand for a bridge when a drift is fitted to it: where it is, and how it moves there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.bridges.laws.growth import Coupling
from stochdyn.bridges.laws.linearised import Transition
from stochdyn.core.gaussian.batch_last import cholesky, mv

__all__ = ["DriftNodes", "bridge_nodes", "choose_pairs", "effective_pairs"]

# Pairs that together have less than this share of a coupling don't count.
_DROPPED = 1e-10
# Above this dimension the 2 d points of the cubature rule give way to pairs of opposite random ones.
_MAX_CUBATURE = 8


@dataclass(frozen=True)
class DriftNodes:
    r"""A quadrature rule for expectations over a law of paths and over time.

    .. math:: \mathbb E\int g(t,X_t,u_t)\,dt\approx\sum_jw_j\,g(t_j,x_j,u_j)

    Attributes:
        t: The times of the nodes, ``(N, 1)``.
        x: The states of the nodes, ``(N, d)``.
        u: The drifts at the nodes, ``(N, d)``; their conditional mean given time and state is the drift of the law.
        weight: The weights of the nodes, ``(N,)``, in units of time; they add up to the length of the time span.
    """

    t: Tensor
    x: Tensor
    u: Tensor
    weight: Tensor

    @staticmethod
    def join(parts: list[DriftNodes]) -> DriftNodes:
        """Return all nodes of several time spans."""
        fields = ("t", "x", "u", "weight")
        return DriftNodes(*(torch.cat([getattr(p, name) for p in parts]) for name in fields))

    def __len__(self) -> int:
        return self.x.shape[0]


def effective_pairs(coupling: Coupling) -> float:
    """Return the number of pairs that carry a coupling, the exponential of its entropy."""
    entropy, mass = 0.0, float(coupling.mass)
    for _, block in coupling.blocks():
        own = block.double() / mass
        entropy -= float(torch.special.xlogy(own, own).sum())
    return math.exp(entropy)


def choose_pairs(
    coupling: Coupling, num_pairs: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row indices, column indices and weights ``(S,)`` that stand for a coupling.

    All pairs that matter if they are at most ``num_pairs``; else a systematic sample of that many, equally weighted, whose
    counts differ by less than one from what is expected in every run of rows.
    """
    n, m = coupling.shape[-2:]
    if n * m <= max(4 * num_pairs, 2**20):
        mass = coupling.plan().flatten()
        ordered = mass.sort()
        kept = ordered.indices[ordered.values.double().cumsum(0) > _DROPPED * mass.double().sum()]
        if len(kept) <= num_pairs:
            kept = kept.sort().values
            return kept // m, kept % m, mass[kept] / mass[kept].sum()
    # systematic sampling: equally spaced points on the line of cumulated mass, from one uniform offset
    total = coupling.mass.double()
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=total.device)
    grid = torch.arange(num_pairs, dtype=torch.float64, device=total.device)
    points = (offset + grid) * (total / num_pairs)
    found, before, row = [], torch.zeros_like(total), 0
    for rows, block in coupling.blocks():
        reach = before + block.double().flatten().cumsum(0)
        last = rows.stop is None or rows.stop >= n
        inside = (points >= before) & ((points < reach[-1]) if not last else (points >= before))
        place = torch.searchsorted(reach, points[inside], right=True).clamp_max(block.numel() - 1)
        found.append(place + row * m)
        before, row = reach[-1], row + block.shape[-2]
    chosen = torch.cat(found)
    weight = block.new_full(chosen.shape, 1.0 / len(chosen))
    return chosen // m, chosen % m, weight


def bridge_nodes(
    part: Transition,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    generator: torch.Generator | None = None,
    times_per_pair: int | None = None,
) -> DriftNodes:
    """Return nodes for the pinned process of weighted pairs ``x, y (S, d)`` over one interval.

    Times are those of the transition's quadrature rule. The Gaussian law at each is replaced by ``2 d`` points at
    plus and minus ``sqrt(d)`` standard deviations along its axes, exact up to third degree, or beyond eight dimensions by two
    opposite random ones. With ``times_per_pair`` each pair sees only that many times, spread evenly, and neighbouring pairs
    see others.
    """
    # mean and covariance of every pinned process at the quadrature's times, and its drift there, which is affine in the state
    pinned = part.chain(x, y).pin(y.mT.contiguous())
    size, dim = x.shape
    mean = pinned.mean(x.mT.contiguous())[1:-1]
    covariance, slope, level = pinned.covariance()[1:-1], pinned.slope[1:], pinned.level[1:]
    t, quadrature = part.ts[1:-1].to(x)[:, None], part.quadrature.to(x)[:, None]
    count = len(t)
    if times_per_pair is not None and times_per_pair < count:
        # the golden ratio spreads the first times of successive pairs evenly over the interval
        turn = torch.arange(size, dtype=torch.float64, device=x.device) * (0.5 * (math.sqrt(5) - 1)) % 1
        apart = torch.arange(times_per_pair, device=x.device)[:, None] / times_per_pair
        place = ((turn + apart) % 1 * count).long().clamp_max(count - 1)  # (r, S)
        pair = torch.arange(size, device=x.device)

        def pick(value: Tensor) -> Tensor:
            """Take from ``(K-1, ..., S or 1)`` the chosen times of every pair, ``(r, ..., S)``."""
            own = value.expand(*value.shape[:-1], size).movedim(-1, 1)
            return own[place, pair].movedim(1, -1)

        mean, covariance, slope, level, t = (pick(v) for v in (mean, covariance, slope, level, t))
        quadrature = pick(quadrature) * (count / times_per_pair)
    factor = cholesky(covariance)
    if dim <= _MAX_CUBATURE:
        # third-degree cubature: E f(X) = 1/(2d) sum_i f(m +- sqrt(d) L_i)
        columns = math.sqrt(dim) * factor.transpose(0, 2)  # (d columns, d rows, K-1, P)
        offsets = torch.cat((columns, -columns)).transpose(1, 2)
    else:
        draws = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        away = mv(factor, draws)
        offsets = torch.stack((away, -away))
    states = mean + offsets  # (C, K-1, d, P)
    drifts = mv(slope, states) + level
    copies, times = states.shape[0], states.shape[1]
    return DriftNodes(
        t.expand(copies, times, size).reshape(-1, 1),
        states.movedim(2, -1).reshape(-1, dim),
        drifts.movedim(2, -1).reshape(-1, dim),
        (quadrature * (weight / copies)).expand(copies, times, size).reshape(-1),
    )
