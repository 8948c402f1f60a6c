"""Trajectories of a bridge: partners along the chain of couplings, births and deaths, and states between snapshots."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.growth import Births, Growth
from stochdyn.bridges.laws.importance import weighted_paths
from stochdyn.bridges.laws.linearised import AffineTransition, LinearisedTransition, Transition
from stochdyn.bridges.laws.marginal import draw_index
from stochdyn.core.gaussian.batch_last import cholesky
from stochdyn.core.transport.entropic import TransportPlan
from stochdyn.errors import ApproximationWarning, NonFiniteError

__all__ = ["draw_partners", "draw_paths", "finite_pairs", "pinned_law"]

# A larger share of a law than this can't be left out of it.
_LOST = 0.05
# Numbers in the rows of a coupling that are looked at together.
_CHUNK = 2**24


def draw_partners(plan: TransportPlan, first: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the partners ``(n,)`` of particles ``first (n,)`` of the earlier snapshot."""
    parts = []
    for own in first.split(max(1, _CHUNK // plan.shape[-1])):
        # the inverse of each row's distribution function at a uniform number
        rows = plan.rows(own)
        reach = rows.double().cumsum(-1)
        point = torch.rand(len(own), 1, generator=generator, dtype=torch.float64, device=rows.device)
        chosen = torch.searchsorted(reach, point * reach[:, -1:], right=True).squeeze(-1)
        parts.append(chosen.clamp_max(rows.shape[-1] - 1))
    return torch.cat(parts) if parts else first


def draw_paths(
    snapshots: Snapshots,
    plans: Sequence[TransportPlan],
    parts: Sequence[Transition],
    growths: Sequence[Growth | None],
    ts: Tensor,
    n: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return states ``(n, T, d)`` at ``ts``, and innovations of unit covariance rate, ``(n, T-1, d)``.

    Where the population grows, there are none: ``(n, T-1, 0)``.
    """
    visited = draw_index(snapshots.weights[0], n, generator)
    times, wanted = snapshots.times, ts.to(snapshots.times)
    slack = 1e-9 * float(times[-1] - times[0])
    x = snapshots.samples[0].new_empty(len(ts), snapshots.dim, n)
    reached = torch.zeros_like(x)  # sum of innovations up to each time
    total = torch.zeros_like(x[0])
    x[(wanted - times[0]).abs() <= slack] = snapshots.samples[0][visited].mT
    for i, (part, plan, growth) in enumerate(zip(parts, plans, growths, strict=True)):
        births: list[Births] = []
        if growth is None:
            partner = last = draw_partners(plan, visited, generator)
        else:
            partner, last, births = growth.run(visited, generator)
        a, b = part.start, part.end
        if b < float(wanted[0]) - slack or a > float(wanted[-1]) + slack:
            visited = last
            continue
        inside = (wanted > a + slack) & (wanted < b - slack)
        at_end = (wanted - b).abs() <= slack
        grid, places = _merged(part, wanted[inside])
        ends = snapshots.samples[i][visited], snapshots.samples[i + 1][partner]
        states, innovations = _pinned_paths(part, *ends, grid, generator)
        states = states[places]
        for own in births:
            ends = snapshots.samples[i][own.first], snapshots.samples[i + 1][own.second]
            again = _pinned_paths(part, *ends, grid, generator)[0][places]
            later = wanted[inside][:, None] > a + own.share * (b - a)
            states[:, :, own.path] = torch.where(later[:, None], again, states[:, :, own.path])
        sums = total + innovations.cumsum(0)
        x[inside], x[at_end] = states, snapshots.samples[i + 1][last].mT
        reached[inside], reached[at_end] = sums[places - 1], sums[-1]
        total, visited = sums[-1], last
    if any(growth is not None for growth in growths):
        return x.permute(2, 0, 1), x.new_empty(n, len(ts) - 1, 0)
    # innovations in units of the noise: dw = G^{-1} (sum of innovations at the end of a step less that at its start)
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
    states, increments, weights = weighted_paths(part.family, chain, x, y, repeats, generator)
    # one path per pair, by its share of the pair's importance weights
    uniform = torch.rand(x.shape[-1], generator=generator, dtype=x.dtype, device=x.device)
    chosen = (torch.softmax(weights, 0).cumsum(0) < uniform).sum(0).clamp_max(len(weights) - 1)
    which = torch.arange(x.shape[-1], device=x.device)
    pick = (chosen, slice(None), slice(None), which)
    return states[pick].permute(1, 2, 0), increments[pick].permute(1, 2, 0)


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
        NonFiniteError: If they are more than a twentieth of the law.
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
            hint="give a smaller dt, or a smoother drift",
        )
    warnings.warn(
        f"At t={time:g} the grid is too coarse for the drift on the way of {int((~fine).sum())} pairs, {share:.2%} of the law. "
        "They are left out; a smaller dt would keep them",
        ApproximationWarning,
        stacklevel=3,
    )
    kept = weight[fine] / weight[fine].sum()
    return means[fine], factors if shared else factors[fine], kept
