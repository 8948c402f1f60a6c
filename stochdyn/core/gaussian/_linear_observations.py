"""Observations at arbitrary times, and the posterior of a linear-Gaussian path given them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import (
    check_finite,
    check_nonempty,
    check_same_device,
    check_same_dtype,
    check_time_grid,
)
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.errors import InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.gaussian.measure import LinearGaussianMeasure

__all__ = ["LinearGaussianPosterior", "gather_observations"]


@dataclass(frozen=True)
class LinearGaussianPosterior:
    """The law of a linear-Gaussian path given noisy observations.

    Attributes:
        ts: ``(T,)`` times of the answer.
        mean: ``(*B, T, d)``.
        covariance: ``(*B, T, d, d)``, of the marginals.
        log_evidence: ``(*B,)`` log density of the observations.
    """

    ts: Tensor
    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor
    _chain: GaussianChain
    _observations: dict[str, Any]
    _where: Tensor

    @property
    def variance(self) -> Tensor:
        """``(*B, T, d)`` marginal variances, clipped at zero."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` joint paths, ``(n, *B, T, d)``, reparametrised."""
        paths = self._chain.sample_posterior(n, **self._observations, generator=generator)
        return paths.index_select(1, self._where).movedim(1, -2)


def gather_observations(
    law: LinearGaussianMeasure,
    obs_ts: Tensor,
    y: Tensor,
    obs_scale: Tensor | float,
    emission: Tensor | None,
    mask: Tensor | None,
    at: Tensor | None,
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Check observations and put them on the union of ``obs_ts`` and ``at``.

    Returns:
        the union ``(N+1,)``, the arguments of :meth:`GaussianChain.filter`, and where in the union the wanted
        times are.
    """
    check_time_grid(obs_ts, "obs_ts", min_points=1)
    check_nonempty(y, "y")
    check_same_device(obs_ts=obs_ts, y=y, at=at, mask=mask, emission=emission)
    check_same_dtype(y=y, initial_mean=law.initial_mean, emission=emission)
    if y.ndim < 2 or y.shape[-2] != obs_ts.shape[0]:
        raise ShapeError(
            "y must have one row per time",
            got=f"shape {tuple(y.shape)}",
            expected=f"(*B, {obs_ts.shape[0]}, p)",
            hint="a scalar series is y[:, None]" if y.ndim == 1 else None,
        )
    p = y.shape[-1]
    if emission is None:
        if p != law.dim:
            raise ShapeError(
                "y doesn't fit the state", got=f"p={p}", expected=law.dim, hint="give an emission (p, d)"
            )
        emission = torch.eye(p, dtype=y.dtype, device=y.device)
    elif emission.ndim > 2:
        emission = emission.movedim(-3, 0)
    cov = _noise_covariance(obs_scale, y)
    data = y.movedim(-2, 0)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not 1 <= mask.ndim <= y.ndim:
            raise ShapeError("mask must be a boolean tensor (T,), (*B, T) or (*B, T, p)")
        mask = mask.movedim(-2 if mask.ndim == y.ndim else -1, 0)
        if mask.shape[0] != obs_ts.shape[0]:
            raise ShapeError("mask must fit obs_ts", got=f"{mask.shape[0]} times", expected=obs_ts.shape[0])
    if at is None:
        nodes, places = obs_ts, torch.arange(obs_ts.shape[0], device=obs_ts.device)
        return nodes, {"y": data, "emission": emission, "obs_cov": cov, "mask": mask}, places
    check_time_grid(at, "at", min_points=1)
    check_same_dtype(obs_ts=obs_ts, at=at)
    nodes = torch.unique(torch.cat((obs_ts, at)))
    seen, wanted = torch.searchsorted(nodes, obs_ts), torch.searchsorted(nodes, at)
    count = nodes.shape[0]
    if mask is None:
        mask = torch.ones(obs_ts.shape[0], dtype=torch.bool, device=y.device)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(count, *x.shape[1:]).index_copy(0, seen, x)

    placed = {
        "y": spread(data),
        "emission": emission if emission.ndim == 2 else spread(emission),
        "obs_cov": cov if cov.ndim == 2 else spread(cov),
        "mask": spread(mask),
    }
    return nodes, placed, wanted


def _noise_covariance(obs_scale: Tensor | float, y: Tensor) -> Tensor:
    """Return ``(p, p)`` for one scale, else ``(T, *B, p, p)``."""
    if isinstance(obs_scale, Tensor):
        check_same_dtype(obs_scale=obs_scale, y=y)
        check_same_device(obs_scale=obs_scale, y=y)
    scale = torch.as_tensor(obs_scale, dtype=y.dtype, device=y.device)
    check_finite(scale.detach(), "obs_scale")
    if bool((scale < 0).any()):
        raise InvalidInputError("obs_scale must not be negative", got=f"minimum {scale.min().item():g}")
    p, times = y.shape[-1], y.shape[-2]
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
