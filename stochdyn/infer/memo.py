"""Paths that a guide has already integrated, so that the model doesn't run the time loop a second time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.sde import SDE
from stochdyn.core.solvers import full_state, step_everywhere

__all__ = ["Driven", "remember_path", "remembered_path"]


@dataclass(frozen=True)
class Driven:
    """A path ``x (T, *batch, d)`` and its full states ``z (T, *batch, Z)``, kept as long as the increments that drove it live."""

    x: Tensor
    z: Tensor


def remember_path(increments: Tensor, driven: Driven) -> None:
    """Attach the path to its increments."""
    increments._stochdyn_driven = driven  # type: ignore[attr-defined]


def remembered_path(
    increments: Tensor, sde: SDE, ts: Tensor, x0: Tensor, memory0: Tensor | None
) -> Tensor | None:
    """Return the path ``(T, *batch, d)`` that a guide has integrated for these very increments, if the equation is still the same.

    One vectorised step from all grid points verifies it; the time loop is spared.
    """
    driven = getattr(increments, "_stochdyn_driven", None)
    if driven is None:
        return None
    with torch.no_grad():
        z = driven.z
        e = increments.movedim(-2, 0)
        channels = sde.noise_dim(ts[0].to(x0.dtype), x0)
        start = full_state(x0, memory0) if memory0 is not None else x0
        size = z.shape[-1] - (channels * sde.noise.num_states)
        if size != x0.shape[-1] or e.shape[0] != z.shape[0] - 1:
            return None
        off = (step_everywhere(sde, ts, z[:-1], e) - z[1:]).abs().max()
        off_start = (z[0][..., : start.shape[-1]] - start).abs().max()
        tolerance = 1e-4 if z.dtype == torch.float32 else 1e-9
        if not bool(torch.maximum(off, off_start) <= tolerance * (1 + z.abs().max())):
            return None
    return driven.x
