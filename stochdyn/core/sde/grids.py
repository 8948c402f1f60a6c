"""Time grids beside states: one for all paths, ``(T,)``, or one per series, ``(*batch, T)``."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._transforms import transforms_are_active
from stochdyn.core.sde.noise import Brownian, NoiseProcess, NoiseSteps

__all__ = ["first_time", "noise_steps", "step_sizes", "steps_of", "time_column"]


def time_column(ts: Tensor, like: Tensor) -> Tensor:
    """Return times ``(N,)`` or ``(*batch, N)`` so that they lead and broadcast with ``like (N, *batch, d)[..., :1]``."""
    ts = ts.to(like.dtype)
    if ts.ndim == 1:
        return ts.reshape(-1, *(1,) * (like.ndim - 1))
    ts = ts.movedim(-1, 0)
    return ts.reshape(ts.shape[0], *(1,) * (like.ndim - 1 - ts.ndim), *ts.shape[1:], 1)


def steps_of(ts: Tensor, like: Tensor) -> Tensor:
    """Return the steps of the grid as a column; differences are taken in the grid's own precision."""
    return time_column(ts[..., 1:] - ts[..., :-1], like)


def first_time(ts: Tensor, like: Tensor) -> Tensor:
    """Return the first time, of no axes or ``(*batch, 1)``, in the precision of ``like``."""
    return ts[0].to(like.dtype) if ts.ndim == 1 else ts[..., :1].to(like.dtype)


def step_sizes(ts: Tensor, dtype: torch.dtype) -> list[float] | list[Tensor]:
    """Return the steps of a time loop: numbers where nothing differentiates the grid, for which torch has cheaper kernels.

    All of them come to the host in one transfer, before the loop.
    """
    gaps = ts[..., 1:] - ts[..., :-1]
    if ts.ndim == 1 and not (ts.requires_grad and torch.is_grad_enabled()) and not transforms_are_active():
        return gaps.tolist()
    gaps = gaps.to(dtype)
    return list(gaps.unbind(0) if ts.ndim == 1 else gaps.movedim(-1, 0).unsqueeze(-1).unbind(0))


def noise_steps(noise: NoiseProcess, ts: Tensor, dtype: torch.dtype) -> NoiseSteps:
    """Return the recursion of a noise on one grid ``(T,)``, or on one per series: coefficients ``(N, *batch, ...)``."""
    if ts.ndim == 1:
        return noise.steps(ts, dtype=dtype)
    batch = ts.shape[:-1]
    if isinstance(noise, Brownian):
        dt = (ts[..., 1:] - ts[..., :-1]).to(dtype).movedim(-1, 0).unsqueeze(-1)
        empty = dt.new_zeros(*dt.shape[:-1], 0)
        still = empty.unsqueeze(-2)
        return NoiseSteps(dt, torch.ones_like(dt), empty, still, still, per_series=True)
    rows = [noise.steps(row, dtype=dtype) for row in ts.reshape(-1, ts.shape[-1])]

    def gather(name: str) -> Tensor:
        parts = torch.stack([getattr(row, name) for row in rows], 1)
        return parts.reshape(parts.shape[0], *batch, *parts.shape[2:])

    decay = gather("decay").unsqueeze(-2)
    return NoiseSteps(
        gather("variance"), gather("gain"), gather("recall"), decay, gather("load"), rows[0].per_channel, True
    )
