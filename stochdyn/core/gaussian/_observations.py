"""Observations of a chain, checked and brought into the layout of the Kalman recursions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_finite
from stochdyn.core.gaussian._batching import align, broadcast_batches, flatten_batch
from stochdyn.errors import ShapeError

__all__ = ["Observed", "prepare"]


@dataclass(frozen=True)
class Observed:
    """Observations with missing values removed, on one flat batch axis (see ``_kalman``)."""

    batch: torch.Size
    flat: int  # 1 if the covariances are shared by all series, else the number of series
    y: Tensor  # (N+1, *batch, p)
    emission: Tensor  # (N+1, flat, p, z)
    obs_cov: Tensor  # (N+1, flat, p, p)
    num_seen: Tensor  # (*batch,)


def prepare(
    y: Tensor,
    emission: Tensor,
    obs_cov: Tensor,
    mask: Tensor | None,
    shape: tuple[int, int],
    cov_batch: torch.Size,
    chain_batch: torch.Size,
) -> Observed:
    """Check observations against ``shape = (N+1, z)`` and replace missing components by pure unit noise.

    A missing component has a zero row of the emission, independent noise of variance one and the value zero:
    exactly the marginal law of the others, and free of a branch per step.
    """
    times, size = shape
    if y.ndim < 2 or y.shape[0] != times or y.shape[-1] == 0:
        raise ShapeError("y has the wrong shape", got=tuple(y.shape), expected=f"({times}, *B, p)")
    p = y.shape[-1]
    for name, x, event in (("emission", emission, (p, size)), ("obs_cov", obs_cov, (p, p))):
        if tuple(x.shape[-2:]) != event or (x.ndim > 2 and x.shape[0] != times):
            expected = f"{event} or ({times}, *B, {event[0]}, {event[1]})"
            raise ShapeError(f"{name} has the wrong shape", got=tuple(x.shape), expected=expected)
        check_finite(x.detach(), name)
    emission, obs_cov = (x if x.ndim > 2 else x.expand(times, *x.shape) for x in (emission, obs_cov))
    seen = _component_mask(mask, y)
    shared = broadcast_batches(
        {
            "chain": tuple(cov_batch),
            "emission": tuple(emission.shape[1:-2]),
            "obs_cov": tuple(obs_cov.shape[1:-2]),
            "mask": tuple(seen.shape[1:-1]),
        }
    )
    batch = broadcast_batches(
        {"chain": tuple(chain_batch), "y": tuple(y.shape[1:-1]), "observation law": tuple(shared)}
    )
    flat = 1 if shared.numel() == 1 else batch.numel()
    y, full = align(y, 1, 1, batch), align(seen, 1, 1, batch)
    h = flatten_batch(emission, 1, 2, batch, flat)
    r = flatten_batch(obs_cov, 1, 2, batch, flat)
    if mask is not None:
        y = torch.where(full, y, torch.zeros((), dtype=y.dtype, device=y.device))
        keep = flatten_batch(seen, 1, 1, batch, flat)[..., None]
        h = torch.where(keep, h, torch.zeros_like(h))
        eye = torch.eye(p, dtype=y.dtype, device=y.device)
        r = torch.where(keep & keep.mT, r, eye.expand_as(r))
    check_finite(y.detach(), "y")
    return Observed(batch, flat, y, h, r, full.sum(-1).sum(0).to(y.dtype))


def _component_mask(mask: Tensor | None, y: Tensor) -> Tensor:
    """Return ``(N+1, *B, p)``, True where observed; batch axes may be of size one."""
    times, p = y.shape[0], y.shape[-1]
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=y.device).expand(times, *(1,) * (y.ndim - 2), p)
    if mask.dtype != torch.bool or not 1 <= mask.ndim <= y.ndim or mask.shape[0] != times:
        raise ShapeError(
            "mask must be boolean and fit y",
            got=f"{mask.dtype} {tuple(mask.shape)}",
            expected=f"({times}, *B) or ({times}, *B, {p})",
        )
    if mask.ndim < y.ndim:
        return mask[..., None].expand(*mask.shape, p)
    if mask.shape[-1] not in (1, p):
        raise ShapeError("mask must fit y along the last axis", got=tuple(mask.shape), expected=p)
    return mask.expand(*mask.shape[:-1], p)
