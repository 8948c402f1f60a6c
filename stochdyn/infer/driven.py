"""Paths that increments drive: integrated once, by whoever needs them first, or given before they are integrated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

from stochdyn.core.sde.grids import time_column
from stochdyn.core.sde.solvers import integrate, remember
from stochdyn.infer.shaping import shape_increments

if TYPE_CHECKING:
    from stochdyn.infer.distributions import PathIncrements

__all__ = ["DrivenPath", "sample_driven"]


class DrivenPath:
    """The path that a guide has integrated while it drew increments, handed on with their site.

    Pyro replays the ``infer`` dictionary of a guide's site into the model, so the object that the guide puts there comes
    to the model with the value. The model takes the path over only if nothing that decides it has changed.
    """

    def __init__(self) -> None:
        self._increments: Tensor | None = None
        self._law: PathIncrements | None = None
        self._x = self._z = torch.empty(0)
        self._marks: tuple[Tensor, ...] = ()

    def set(self, law: PathIncrements, increments: Tensor, x: Tensor, z: Tensor) -> None:
        """Note the path ``x (T, *batch, d)`` and the full states ``z (T, *batch, Z)`` that ``increments (*batch, N, M)`` drive."""
        self._increments, self._law, self._x, self._z = increments, law, x, z
        with torch.no_grad():
            self._marks = _marks(law, z, increments.movedim(-2, 0))

    def path(self, law: PathIncrements, increments: Tensor) -> Tensor | None:
        """Return the path ``(T, *batch, d)`` of these increments under ``law``, or None if anything that decides it differs.

        The equation counts as the same only if drift, noise, control and memory come out equal to the bit at all grid
        points: one vectorised evaluation instead of the time loop. A tolerance would let a slightly changed parameter
        pass.
        """
        z = self._z
        if self._law is None or not self._is_mine(increments) or law.method.name != self._law.method.name:
            return None
        if z.shape[0] != law.ts.shape[-1] or law.x0.shape[-1] != self._x.shape[-1]:
            return None
        dim, first = law.x0.shape[-1], z[0]
        memory = torch.zeros_like(first[..., dim:]) if law.memory0 is None else law.memory0.flatten(-2)
        if not _same(first[..., :dim], law.x0) or not _same(first[..., dim:], memory):
            return None
        marks = _marks(law, z, increments.movedim(-2, 0))
        if any(m.requires_grad for m in marks) and not self._x.requires_grad:
            # The guide ran without a graph, and the model wants one.
            return None
        if len(marks) != len(self._marks) or not all(map(_same, self._marks, marks)):
            return None
        return self._x

    def _is_mine(self, increments: Tensor) -> bool:
        """Return whether the increments are those of the path: the very tensor, or equal numbers off the graph."""
        mine = self._increments
        if mine is None or increments is mine:
            return mine is not None
        graph = mine.requires_grad or increments.requires_grad or self._x.requires_grad
        return not graph and increments.shape == mine.shape and torch.equal(increments, mine)


class _Handed(Messenger):
    """Read what comes with the site of the increments."""

    path: DrivenPath | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        self.path = (msg["infer"] or {}).get("driven")


def sample_driven(name: str, law: PathIncrements) -> Tensor:
    """Sample the increments of path ``name`` and return the path that they drive, ``(*batch, T, d)``.

    The path is a message of its own to Pyro's handlers, of type ``"path"``: a handler that knows the path already
    gives it as the value, and no equation is integrated.
    """
    with _Handed() as handed:
        dw = pyro.sample(f"{name}_dw", law, infer={"path": name})  # type: ignore[arg-type]
    # Increments that a handler gives, once for all, drive one path under each of the parameters.
    batch = torch.broadcast_shapes(dw.shape[:-2], law.batch_shape)
    dw = dw.expand(*batch, *dw.shape[-2:]) if batch != dw.shape[:-2] else dw
    return _drive(law, dw, handed.path, name=name)


@effectful(type="path")
def _drive(law: PathIncrements, increments: Tensor, driven: DrivenPath | None) -> Tensor:
    x = None if driven is None else driven.path(law, increments)
    if x is None:
        e = increments.movedim(-2, 0)
        x = integrate(law.sde, law.x0, law.ts, e, law.memory0, method=law.method).x
    return x.movedim(0, -2)


def _marks(law: PathIncrements, z: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Return what decides a path: grid, drift and noise at all points, and the recursion of the memory."""
    sde, ts = law.sde, law.ts
    states, before = sde.noise.num_states, z[:-1]
    t = time_column(ts[..., :-1], before)
    e = shape_increments(sde, ts, before, e)
    channels = e.shape[-1] // sde.noise.num_innovations(ts)
    if not states:
        return ts, sde.drift(t, before), sde.diffusion(t, before).apply(e[..., :channels])
    steps = law.steps
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
