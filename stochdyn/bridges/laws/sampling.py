"""Trajectories of a bridge: partners along the chain of couplings, and states between them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws._small import cholesky
from stochdyn.bridges.laws.importance import weighted_paths
from stochdyn.bridges.laws.linearised import AffineTransition, LinearisedTransition, Transition
from stochdyn.bridges.laws.marginal import _multinomial
from stochdyn.core.transport.entropic import TransportPlan
from stochdyn.errors import ApproximationWarning, NonFiniteError

__all__ = ["draw_partners", "draw_paths", "finite_pairs", "pinned_law"]

# A larger share of a law than this can't be left out of it.
_LOST = 0.05


def draw_partners(
    plans: list[TransportPlan], first: Tensor, generator: torch.Generator | None
) -> list[Tensor]:
    """Return the particles ``(n,)`` visited at every snapshot, from those at the first one."""
    visited = [first]
    for plan in plans:
        rows = plan.rows(visited[-1])
        reach = rows.double().cumsum(-1)
        point = torch.rand(len(first), 1, generator=generator, dtype=torch.float64, device=rows.device)
        chosen = torch.searchsorted(reach, point * reach[:, -1:], right=True).squeeze(-1)
        visited.append(chosen.clamp_max(rows.shape[-1] - 1))
    return visited


def draw_paths(
    snapshots: Snapshots,
    plans: list[TransportPlan],
    parts: list[Transition],
    ts: Tensor,
    n: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return states ``(n, T, d)`` at ``ts`` and innovations ``(n, T-1, d)`` of unit covariance rate."""
    first = _multinomial(snapshots.weights[0], n, generator)
    visited = draw_partners(plans, first, generator)
    times, wanted = snapshots.times, ts.to(snapshots.times)
    slack = 1e-9 * float(times[-1] - times[0])
    x = snapshots.samples[0].new_empty(len(ts), snapshots.dim, n)
    reached = torch.zeros_like(x)  # sum of innovations up to each time
    total = torch.zeros_like(x[0])
    x[(wanted - times[0]).abs() <= slack] = snapshots.samples[0][first].mT
    for i, part in enumerate(parts):
        a, b = part.start, part.end
        if b < float(wanted[0]) - slack or a > float(wanted[-1]) + slack:
            continue
        start, end = snapshots.samples[i][visited[i]], snapshots.samples[i + 1][visited[i + 1]]
        inside = (wanted > a + slack) & (wanted < b - slack)
        at_end = (wanted - b).abs() <= slack
        grid, places = _merged(part, wanted[inside])
        states, innovations = _pinned_paths(part, start, end, grid, generator)
        sums = total + innovations.cumsum(0)
        x[inside], x[at_end] = states[places], end.mT
        reached[inside], reached[at_end] = sums[places - 1], sums[-1]
        total = sums[-1]
    factor = torch.linalg.cholesky(parts[0].spread)
    white = torch.linalg.solve_triangular(factor, reached.diff(dim=0), upper=False)
    return x.permute(2, 0, 1), white.permute(2, 0, 1)


def _pinned_paths(
    part: Transition, start: Tensor, end: Tensor, grid: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw states ``(K+1, d, n)`` and innovations ``(K, d, n)``; with corrections one of several by its weight."""
    chain = part.chain(start, end, grid)
    x, y = start.mT.contiguous(), end.mT.contiguous()
    repeats = part.corrections if isinstance(part, LinearisedTransition) else 0
    if not repeats:
        return chain.pin(y).sample(x, generator)
    states, kicks, weights = weighted_paths(part.family, chain, x, y, repeats, generator)
    uniform = torch.rand(x.shape[-1], generator=generator, dtype=x.dtype, device=x.device)
    chosen = (torch.softmax(weights, 0).cumsum(0) < uniform).sum(0).clamp_max(len(weights) - 1)
    which = torch.arange(x.shape[-1], device=x.device)
    pick = (chosen, slice(None), slice(None), which)
    return states[pick].permute(1, 2, 0), kicks[pick].permute(1, 2, 0)


def _merged(part: Transition, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return a grid over the interval that contains the times ``inside``, and their places in it.

    An affine transition needs no further points; a linearised one keeps its own where they aren't too close.
    """
    ends = part.ts[[0, -1]].to(inside)
    if isinstance(part, AffineTransition):
        grid = torch.cat((ends[:1], inside, ends[1:]))
    else:
        own = part.ts[1:-1].to(inside)
        if len(inside):
            gap = (own[:, None] - inside).abs().amin(-1)
            own = own[gap > 0.2 * float(part.ts.diff().max())]
        grid = torch.cat((ends, inside, own)).sort().values
    return grid, torch.searchsorted(grid, inside)


def pinned_law(part: Transition, x: Tensor, y: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Return means ``(S, d)`` and lower factors ``(S or 1, d, d)`` at ``time`` of the pinned process."""
    inside = torch.tensor([time], dtype=torch.float64, device=x.device)
    grid, places = _merged(part, inside)
    pinned = part.chain(x, y, grid).pin(y.mT.contiguous())
    place = int(places[0])
    mean = pinned.mean(x.mT.contiguous())[place]
    return mean.mT.contiguous(), cholesky(pinned.covariance()[place]).movedim(-1, 0).contiguous()


def finite_pairs(
    means: Tensor, factors: Tensor, weight: Tensor, time: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop pairs whose linearised process isn't finite, with a warning; returns means, factors and weights of the others.

    A path that runs through a place where the drift turns much faster than the grid can follow has no linear process.

    Raises:
        NonFiniteError: if they are more than a twentieth of the law.
    """
    fine = torch.isfinite(means).all(-1)
    shared = len(factors) == 1 and len(means) > 1
    if not shared:
        fine = fine & torch.isfinite(factors).flatten(1).all(-1)
    if bool(fine.all()):
        return means, factors, weight
    share = float(weight[~fine].sum() / weight.sum())
    if share > _LOST:
        raise NonFiniteError(
            f"the law at t={time:g} isn't finite",
            got=f"{share:.1%} of it",
            hint="give a smaller step, or a smoother drift",
        )
    warnings.warn(
        f"At t={time:g} the grid is too coarse for the drift on the way of {int((~fine).sum())} pairs, {share:.2%} of the law. "
        "They are left out; a smaller step would keep them",
        ApproximationWarning,
        stacklevel=3,
    )
    kept = weight[fine] / weight[fine].sum()
    return means[fine], factors if shared else factors[fine], kept
