"""Observations of a path at any times: checked, laid on a grid, and brought into the layout of the Kalman recursions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import (
    as_mask,
    as_tensor,
    as_time_grid,
    check_finite,
    check_nonempty,
    check_same_device,
    check_same_dtype,
)
from stochdyn.core.gaussian.recursion import align, broadcast_batches, flatten_batch
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Observations", "Observed", "as_observations", "prepare", "union_of", "without_missing"]


@dataclass(frozen=True)
class Observed:
    """Observations with missing values removed, on one flat batch axis (see :mod:`stochdyn.core.gaussian.filter`)."""

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
        # A mask of times alone holds for all series.
        mask = mask.reshape(times, *(1,) * (y.ndim - 1 - mask.ndim), *mask.shape[1:])
        return mask[..., None].expand(*mask.shape, p)
    if mask.shape[-1] not in (1, p):
        raise ShapeError("mask must fit y along the last axis", got=tuple(mask.shape), expected=p)
    return mask.expand(*mask.shape[:-1], p)


@dataclass(frozen=True)
class Observations:
    r"""Values :math:`y_i=HX_{t_i}+\epsilon_i`, :math:`\epsilon_i\sim N(0,R_i)`, time leading.

    Attributes:
        times: The times of data, ``(T,)``, or ``(*B, T)`` where every series has its own.
        y: The observed values ``(T, *B, p)``, zero where nothing was observed.
        emission: The matrix that maps states to observations, ``(p, z)`` or ``(T, *B, p, z)``.
        obs_cov: The covariance of the observation noise, ``(p, p)`` or ``(T, *B, p, p)``.
        mask: The mask ``(T, *B)`` or ``(T, *B, p)``, True where observed, or None if everything is.
    """

    times: Tensor
    y: Tensor
    emission: Tensor
    obs_cov: Tensor
    mask: Tensor | None

    def on(self, nodes: Tensor, where: Tensor | None = None) -> dict[str, Tensor | None]:
        """Lay the values on a grid that holds their times; returns the arguments of a chain's filter.

        Args:
            nodes: The weighted points that stand for a law, ``(M,)``, or ``(*B, M)`` where every series has its own.
            where: Where the times are among them, ``(T,)`` or ``(*B, T)``; found if None.
        """
        if nodes.shape == self.times.shape:
            return {"y": self.y, "emission": self.emission, "obs_cov": self.obs_cov, "mask": self.mask}
        if where is None:
            where = torch.searchsorted(nodes.detach(), self.times.detach())
        if where.ndim > 1:
            return self._on_series(nodes.shape[-1], where)
        mask = self.mask
        if mask is None:
            mask = torch.ones(
                self.times.shape[0], *(1,) * (self.y.ndim - 2), dtype=torch.bool, device=nodes.device
            )

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(nodes.shape[0], *x.shape[1:]).index_copy(0, where, x)

        return {
            "y": spread(self.y),
            "emission": self.emission if self.emission.ndim == 2 else spread(self.emission),
            "obs_cov": self.obs_cov if self.obs_cov.ndim == 2 else spread(self.obs_cov),
            "mask": spread(mask),
        }

    def _on_series(self, count: int, where: Tensor) -> dict[str, Tensor | None]:
        """Lay every series on its own grid of ``count`` nodes; ``where (*B, T)``."""
        given = (self.emission.shape[1:-2], self.obs_cov.shape[1:-2], self.y.shape[1:-1], where.shape[:-1])
        batch = torch.broadcast_shapes(*given)
        index = align(where.movedim(-1, 0), 1, 0, batch)

        def spread(x: Tensor, event: int) -> Tensor:
            full = align(x, 1, event, batch)
            at = index.reshape(*index.shape, *(1,) * event).expand(full.shape)
            return x.new_zeros(count, *full.shape[1:]).scatter(0, at, full)

        return {
            "y": spread(self.y, 1),
            "emission": self.emission if self.emission.ndim == 2 else spread(self.emission, 2),
            "obs_cov": self.obs_cov if self.obs_cov.ndim == 2 else spread(self.obs_cov, 2),
            "mask": spread(_component_mask(self.mask, self.y), 1),
        }


def union_of(*grids: Tensor) -> Tensor:
    """Return the times of all grids, sorted, each once; gradients go to the grid that has a time first."""
    every = torch.cat(grids)
    values, inverse = torch.unique(every.detach(), return_inverse=True)
    if not every.requires_grad:
        return values
    places = torch.full_like(values, every.shape[0], dtype=torch.long)
    index = torch.arange(every.shape[0], device=every.device)
    return every[places.scatter_reduce(0, inverse, index, "amin")]


def as_observations(
    times: object,
    y: object,
    obs_scale: object,
    emission: object,
    mask: object,
    dim: int,
    like: Tensor,
    series_grids: bool = False,
) -> Observations:
    """Check observations of a state like ``like (*B, dim)``; NaN in ``y`` is a missing value, as is False in ``mask``."""
    times = as_time_grid(times, "times", 1, like=like, batch=series_grids)
    y = as_tensor(y, "y", like=like, finite=False)
    check_nonempty(y, "y")
    if y.ndim < 2 or y.shape[-2] != times.shape[-1]:
        raise ShapeError(
            "y must have one row per time",
            got=f"shape {tuple(y.shape)}",
            expected=f"(*B, {times.shape[-1]}, p)",
            hint="a scalar series is y[:, None]" if y.ndim == 1 else None,
        )
    p = y.shape[-1]
    if emission is None:
        if p != dim:
            raise ShapeError(
                "y doesn't fit the state", got=f"p={p}", expected=dim, hint="give an emission (p, d)"
            )
        emission = torch.eye(p, dtype=y.dtype, device=y.device)
    else:
        emission = as_tensor(emission, "emission", like=like)
        if emission.ndim < 2:
            raise ShapeError("emission has too few axes", got=tuple(emission.shape), expected=f"({p}, {dim})")
        emission = emission if emission.ndim == 2 else emission.movedim(-3, 0)
    if emission.ndim > 2 and emission.shape[0] != times.shape[-1]:
        raise ShapeError(
            "emission must fit times", got=f"{emission.shape[0]} times", expected=times.shape[-1]
        )
    if mask is not None:
        mask = as_mask(mask)
        if not 1 <= mask.ndim <= y.ndim:
            raise ShapeError("mask must be a boolean tensor (T,), (*B, T) or (*B, T, p)")
        mask = mask.movedim(-2 if mask.ndim == y.ndim else -1, 0)
        if mask.shape[0] != times.shape[-1]:
            raise ShapeError("mask must fit times", got=f"{mask.shape[0]} times", expected=times.shape[-1])
    check_same_device(times=times, y=y, mask=mask, emission=emission, state=like)
    check_same_dtype(y=y, state=like, emission=emission)
    y = y.movedim(-2, 0)
    mask, y = without_missing(y, mask)
    return Observations(times, y, emission, _noise_covariance(obs_scale, y), mask)


def without_missing(y: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return the mask without what is NaN in ``y (T, *B, p)``, and ``y`` with zeros there."""
    lost = y.detach().isnan()
    if not bool(lost.any()):
        return mask, y
    # Series that miss the same values share their covariances.
    here, batch = ~lost, tuple(range(1, y.ndim - 1))
    common = here.all(batch, keepdim=True) if batch else here
    here = common if torch.equal(common.expand_as(here), here) else here
    if mask is not None:
        whole = mask if mask.ndim == y.ndim else mask[..., None]
        here = here & whole.reshape(y.shape[0], *(1,) * (y.ndim - whole.ndim), *whole.shape[1:])
    return here, torch.where(lost, torch.zeros_like(y), y)


def _noise_covariance(obs_scale: object, y: Tensor) -> Tensor:
    """Return ``(p, p)`` for one scale, else ``(T, *B, p, p)``, for ``y (T, *B, p)``."""
    scale = as_tensor(obs_scale, "obs_scale", like=y)
    check_same_dtype(obs_scale=scale if isinstance(obs_scale, Tensor) and scale.ndim else None, y=y)
    check_same_device(obs_scale=scale, y=y)
    scale = scale.to(y.dtype)
    if bool((scale.detach() < 0).any()):
        raise InvalidInputError("obs_scale must not be negative", got=f"minimum {scale.min().item():g}")
    times, p = y.shape[0], y.shape[-1]
    if scale.ndim > 1 and scale.shape[-2] not in (1, times):
        raise ShapeError(
            "obs_scale has the wrong shape", got=tuple(scale.shape), expected=f"(*B, {times}, {p})"
        )
    if scale.ndim and scale.shape[-1] not in (1, p):
        raise ShapeError(
            "obs_scale has the wrong shape", got=tuple(scale.shape), expected=f"({p},) or (T, {p})"
        )
    if scale.ndim < 2:
        return torch.diag_embed(scale.square().expand(p))
    scale = scale.expand(*scale.shape[:-2], times, p).movedim(-2, 0)
    return torch.diag_embed(scale.square())
