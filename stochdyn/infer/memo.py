"""Paths that a guide has already integrated, so that the model doesn't run the time loop a second time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.law.transition import time_column
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.solvers import remember

__all__ = ["Driven", "remember_path", "remembered_path"]


@dataclass(frozen=True)
class Driven:
    """A path kept as long as the increments that drove it live.

    Attributes:
        x: ``(T, *batch, d)`` path.
        z: ``(T, *batch, Z)`` full states.
        marks: what the equation does at every grid point; see :func:`_marks`.
    """

    x: Tensor
    z: Tensor
    marks: tuple[Tensor, ...]


def remember_path(increments: Tensor, sde: SDE, ts: Tensor, x: Tensor, z: Tensor) -> None:
    """Attach to ``increments (*batch, N, M)`` the path ``x`` and the full states ``z`` that they drive."""
    with torch.no_grad():
        driven = Driven(x, z, _marks(sde, ts, z, increments.movedim(-2, 0)))
    increments._stochdyn_driven = driven  # type: ignore[attr-defined]


def remembered_path(
    increments: Tensor, sde: SDE, ts: Tensor, x0: Tensor, memory0: Tensor | None
) -> Tensor | None:
    """Return the path ``(T, *batch, d)`` of these very increments, or None if the equation isn't the same.

    The equation counts as the same only if drift, noise and memory come out equal to the bit at all grid
    points: one vectorised evaluation instead of the time loop. A tolerance would let a slightly changed
    parameter pass.
    """
    driven: Driven | None = getattr(increments, "_stochdyn_driven", None)
    if driven is None or driven.z.shape[0] != ts.shape[0]:
        return None
    dim, first = x0.shape[-1], driven.z[0]
    memory = torch.zeros_like(first[..., dim:]) if memory0 is None else memory0.flatten(-2)
    if dim != driven.x.shape[-1] or not _same(first[..., :dim], x0) or not _same(first[..., dim:], memory):
        return None
    marks = _marks(sde, ts, driven.z, increments.movedim(-2, 0))
    if any(m.requires_grad for m in marks) and not driven.x.requires_grad:
        # The guide ran without a graph, and the model wants one.
        return None
    if len(marks) != len(driven.marks) or not all(map(_same, driven.marks, marks)):
        return None
    return driven.x


def _marks(sde: SDE, ts: Tensor, z: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Return what decides a path: grid, drift and kick at all points, and the recursion of the memory."""
    states = sde.noise.num_states
    before = z[:-1]
    t = time_column(ts[:-1], before)
    if not states:
        return ts, sde.drift(t, before), sde.diffusion(t, before).apply(e)
    steps = sde.noise.steps(ts, dtype=z.dtype)
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    x = before[..., : z.shape[-1] - channels * states]
    memory = before[..., x.shape[-1] :].unflatten(-1, (channels, states))
    dz, after = remember(steps, slice(None), memory, e, channels)
    return ts, sde.drift(t, x), sde.diffusion(t, x).apply(dz), dz, after


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, up to broadcasting."""
    try:
        return torch.equal(*torch.broadcast_tensors(a, b))
    except RuntimeError:
        return False
