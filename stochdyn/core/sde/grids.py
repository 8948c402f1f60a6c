"""Time grids beside states: one for all paths, ``(T,)``, or one per series, ``(*batch, T)``."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stochdyn._caching import ordinary
from stochdyn._transforms import transforms_are_active
from stochdyn.core.sde.noise import Brownian, NoiseProcess, NoiseSteps

__all__ = ["first_steps", "first_time", "noise_steps", "remembered", "step_sizes", "steps_of", "time_column"]

Answer = TypeVar("Answer")

_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remembered(ts: Tensor, question: Hashable, answer: Callable[[], Answer]) -> Answer:
    """Return an answer about a grid, worked out once per question for as long as the grid stays as it is.

    A training step asks the same of the same grid every time, and to ask a GPU for numbers is to wait for it. The answer
    mustn't hold the grid itself or a view of it, which would keep it alive.
    """
    if (ts.requires_grad and torch.is_grad_enabled()) or transforms_are_active():
        return answer()
    if ts.is_inference() or not ts.untyped_storage().resizable():
        # It may change without a trace: made in inference mode, or the memory is another one's, of a NumPy array, say.
        return answer()
    version = ts._version
    known: dict[Hashable, tuple[int, Any]] = _KNOWN.setdefault(ts, {})
    if question not in known or known[question][0] != version:
        known[question] = version, ordinary(answer)
    return cast(Answer, known[question][1])


def first_steps(noise: NoiseProcess, ts: Tensor, dtype: torch.dtype) -> NoiseSteps:
    """Return the recursion of a noise on the first interval, which tells its layout."""
    return noise_steps(noise, remembered(ts, "first interval", lambda: ts[..., :2].clone()), dtype)


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
        return remembered(ts, "steps", gaps.tolist)
    gaps = gaps.to(dtype)
    return list(gaps.unbind(0) if ts.ndim == 1 else gaps.movedim(-1, 0).unsqueeze(-1).unbind(0))


def noise_steps(noise: NoiseProcess, ts: Tensor, dtype: torch.dtype) -> NoiseSteps:
    """Return the recursion of a noise on one grid ``(T,)``, or on one per series: coefficients ``(N, *batch, ...)``."""
    if ts.ndim == 1:
        return noise.steps(ts, dtype=dtype)
    batch = ts.shape[:-1]
    if isinstance(noise, Brownian):
        dt = (ts[..., 1:] - ts[..., :-1]).to(dtype).movedim(-1, 0)
        variance, gain = noise.innovations(dt)
        empty = dt.new_zeros(*dt.shape, 0)
        still = empty.unsqueeze(-2)
        load = still.expand(*dt.shape, variance.shape[-1], 0)
        return NoiseSteps(variance, gain, empty, still, load, per_series=True)
    rows = [noise.steps(row, dtype=dtype) for row in ts.reshape(-1, ts.shape[-1])]

    def gather(name: str) -> Tensor:
        parts = torch.stack([getattr(row, name) for row in rows], 1)
        return parts.reshape(parts.shape[0], *batch, *parts.shape[2:])

    decay = gather("decay").unsqueeze(-2)
    return NoiseSteps(
        gather("variance"), gather("gain"), gather("recall"), decay, gather("load"), rows[0].per_channel, True
    )
