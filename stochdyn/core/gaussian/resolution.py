r"""Steps that resolve an equation between the times of data: halving them leaves the law of the path at these times as it is.

With step h, the path that is at x at one time of data is at the next one with mean m and covariance V. Half the step has m' and
V', and

.. math:: \mathrm{KL}_k=\tfrac12\big[\mathrm{tr}\,V^{-1}V'+(m-m')^\top V^{-1}(m-m')-d+\log\det V-\log\det V'\big]

in nats, summed over the times and averaged over paths of the equation, bounds the divergence between the two laws of any data. It
falls as the square of the step.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.core.gaussian.nonlinear import UnscentedKalman
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.stops import EulerTransitions, Stops
from stochdyn.errors import ApproximationWarning

__all__ = ["resolving_stops"]

# The divergence in nats that half the steps may make: the log evidence then moves by about sqrt(2 * 0.005) = 0.1.
_NATS = 0.005
# Beyond this divergence in an interval it no longer falls as the square of the step, and shorter ones are tried.
_FAR = 0.05
# Few intervals are looked at more finely, so that a pulse between the times is seen.
_LEAST_STEPS = 32
_MOST_STEPS = 128
# What moves without noise is known to this part of its movement.
_PART = 1e-2


def resolving_stops(sde: SDE, starts: Tensor, stops: Stops) -> Stops:
    """Return a grid through times of data with steps that resolve the equation, the same number for all series.

    Args:
        sde: The equation. A control that belongs to the steps of a grid plays no part.
        starts: Draws ``(P, *batch, d)`` from the law of the start.
        stops: The times of data with one step to each.

    Warns:
        ApproximationWarning: If 128 steps in an interval aren't enough.
    """
    knots = stops.ts.detach()
    if knots.shape[-1] < 2:
        return stops
    if sde.control is not None and type(sde.control).shape_increment is not Control.shape_increment:
        sde = sde.uncontrolled()
    with torch.no_grad():
        level = max(2, math.ceil(_LEAST_STEPS / (knots.shape[-1] - 1)))
        share, single = _divergences(sde, starts, knots, level)
        # One step instead of n has n^2 times the divergence.
        alone = share * level**2
        # Where a single step is further off than that law says, fewer steps than these may miss what happens between.
        missed = (single > 16 * alone) & (single > _NATS / single.numel())
        least = torch.where(missed, float(level), 1.0).double()
        while bool((share > _FAR).any()) and 4 * level < _MOST_STEPS:
            level *= 4
            finer, _ = _divergences(sde, starts, knots, level)
            alone = torch.where(share > _FAR, finer * level**2, alone)
            share = torch.where(share > _FAR, finer, share)
        # The least number of steps in all, sum m_i, whose divergence sum c_i / m_i^2 is what is allowed: m_i ~ c_i^(1/3).
        root = alone.nan_to_num(posinf=_NATS * float(_MOST_STEPS) ** 3).double().pow(1 / 3)
        counts = (root * (root.sum() / _NATS).sqrt()).ceil().maximum(least)
    if values_are_checked() and bool((counts > _MOST_STEPS).any()):
        warnings.warn(
            f"{_MOST_STEPS} Euler steps in an interval between the times don't resolve the equation. Give dt, or write the "
            "equation in coordinates in which it varies less",
            ApproximationWarning,
            stacklevel=5,
        )
    return stops.divided([int(n) for n in counts.clamp_max(_MOST_STEPS).tolist()])


def _divergences(sde: SDE, starts: Tensor, knots: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Return the divergences ``(I,)`` in nats of ``2 level`` steps in each interval from ``level`` and from one, at the worst member."""
    dim, count = starts.shape[-1], knots.shape[-1] - 1
    path = Stops(knots, (0,) + (1,) * count).divided([2 * level] * count)
    walk = EulerTransitions(sde, path, starts)
    source = torch.Generator(starts.device).manual_seed(0)
    z = torch.nn.functional.pad(starts, (0, walk.size - dim))
    places = []
    for n in range(walk.num_steps):
        if n % (2 * level) == 0:
            places.append(z)
        shape = (*z.shape[:-1], walk.width)
        normal = torch.randn(shape, generator=source, dtype=z.dtype, device=z.device)
        z = walk.push(n, z, normal)
    before = torch.stack(places)
    # All intervals at once, each as a series (I, 1, *batch) with a grid of its own.
    left, right = (x.movedim(-1, 0).unsqueeze(1) for x in (knots[..., :-1], knots[..., 1:]))
    fill = (1,) * (starts.ndim - left.ndim)
    left, right = (x.reshape(*x.shape[:2], *fill, *x.shape[2:], 1) for x in (left, right))
    moments = []
    for n in (level, 1, 2 * level):
        share = torch.arange(n + 1, device=knots.device).to(knots.dtype) / n
        ts = torch.where(share < 1.0, left + share * (right - left), right)
        moments.append(_moved(EulerTransitions(sde, Stops(ts, (0, n)), before[..., :dim]), before))
    found = [_kullback_leibler(before, *one, *moments[-1], dim).mean(1) for one in moments[:-1]]
    share, single = (nats.reshape(count, -1).amax(1) for nats in found)
    return share, single


def _moved(chain: EulerTransitions, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance at the end of what is at ``z`` at the start."""
    rule, size = UnscentedKalman(), chain.size
    belief = rule._begin(z, z.new_zeros(*z.shape, size))
    for n in range(chain.num_steps):
        load = partial(chain.load, n)
        found = rule._through(belief, partial(chain.mean, n), load, size)
        belief = rule._move(belief, found, load, n)
    return belief.mean, belief.cov


def _kullback_leibler(
    before: Tensor, mean: Tensor, cov: Tensor, mean2: Tensor, cov2: Tensor, dim: int
) -> Tensor:
    """Return the divergence ``(*batch,)`` of the finer law from the coarser one in the first ``dim`` components, infinite for NaN."""
    here = slice(None, dim)
    gap, moved = mean2[..., here] - mean[..., here], mean2[..., here] - before[..., here]
    rounding = 8 * torch.finfo(mean.dtype).eps * mean2[..., here].abs()
    floor = torch.diag_embed((_PART * moved).square() + rounding.square())
    cov, cov2 = cov[..., here, here] + floor, cov2[..., here, here] + floor
    # In units of each component; one that neither moves nor spreads says nothing.
    unit = cov2.diagonal(dim1=-2, dim2=-1).sqrt()
    still = unit <= 0
    unit = torch.where(still, torch.ones_like(unit), unit)
    gap, extra = gap / unit, torch.diag_embed(still.to(unit))
    both = unit.unsqueeze(-1) * unit.unsqueeze(-2)
    (factor, bad), (factor2, bad2) = (torch.linalg.cholesky_ex(c / both + extra) for c in (cov, cov2))
    root = torch.linalg.solve_triangular(factor, torch.cat([factor2, gap.unsqueeze(-1)], -1), upper=False)
    logs = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - factor2.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    nats = 0.5 * (root.square().sum((-2, -1)) - dim) + logs
    wrong = (bad != 0) | (bad2 != 0) | torch.isnan(nats)
    return torch.where(wrong, torch.full_like(nats, math.inf), nats.clamp_min(0.0))
