r"""Trajectories as data: their Girsanov likelihood is Gaussian regression on increments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_event_size, check_ndim, check_nonempty
from stochdyn.core.law.path import Path
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.graph import farthest_points
from stochdyn.vectorfields.regression._input import as_count
from stochdyn.vectorfields.regression.observations import Observations

__all__ = ["cloud_of_paths", "path_observations", "quadratic_variation", "trials_of"]


def trials_of(paths: Any) -> list[tuple[Tensor, Tensor]]:
    """Return grids ``(T,)`` and states ``(*sample, T, D)`` of one path, one pair of times and states, or a list of such."""
    if isinstance(paths, Path):
        return [_unpack(paths.ts, paths.x)]
    if not isinstance(paths, tuple | list) or not len(paths):
        raise InvalidInputError(
            "paths must be a path, a pair of times and states, or a list of such", got=type(paths).__name__
        )
    if all(isinstance(p, Path) or (isinstance(p, tuple) and len(p) == 2) for p in paths):
        return [trial for p in paths for trial in trials_of(p)]
    if len(paths) == 2:
        return [_unpack(paths[0], paths[1])]
    raise InvalidInputError(
        "paths must be a path, a pair of times and states, or a list of such",
        got=f"a list of {type(paths[0]).__name__}",
        hint="trials of unequal length are a list of pairs (ts, x)",
    )


def _unpack(ts: Any, x: Any) -> tuple[Tensor, Tensor]:
    ts, x = as_time_grid(ts), as_tensor(x, "x", missing=True)
    check_ndim(x, tuple(range(2, 13)), "x", "(*sample, T, D)")
    check_nonempty(x, "x")
    check_event_size(x, ts.shape[0], "x", axis=-2)
    return ts.detach().double(), x.detach().double()


def path_observations(cloud: PointCloud, paths: Any, stride: int = 1) -> Observations:
    r"""Turn trajectories into observations of their drift.

    For :math:`dX=b(X)\,dt+\sigma\,dW` in the tangent spaces, the Girsanov density of a path with respect to the driftless one is

    .. math:: \log\frac{dP_b}{dP_0}=\frac1{\sigma^2}\sum_n\Big(b(X_n)\cdot\Delta X_n-\tfrac12|b(X_n)|^2\Delta_n\Big),

    a quadratic in b: the likelihood of values :math:`y_n=T_n^\top\Delta X_n/\Delta_n` with noise of variance
    :math:`\sigma^2/\Delta_n`. So a Gaussian-process prior on b has an exact posterior. Normal parts of increments, which only
    show how the manifold bends, are dropped.

    Args:
        cloud: The points that sample the manifold.
        paths: A :class:`~stochdyn.PathSample`, ``(ts, x)`` with ``ts (T,)`` and ``x (*sample, T, D)``, or a list of such,
            each trial on a grid of its own. Where a state is NaN it is missing, and the steps to and from it are left out.
        stride: The interval between the states that are used: every state whose number is a multiple of this one. Coarser
            steps cost accuracy of the Euler likelihood, and save rows.

    Returns:
        One row of components per step, with relative variances :math:`1/\Delta_n`.
    """
    stride = as_count(stride, "stride")
    starts, rates, relative = [], [], []
    for ts, x in trials_of(paths):
        check_event_size(x, cloud.ambient_dim, "x")
        ts, x = ts[::stride], x[..., ::stride, :]
        if len(ts) < 2:
            raise InvalidInputError("the stride leaves no step", got=stride)
        dt = ts[1:] - ts[:-1]
        # y_n = ΔX_n / Δ_n with noise of variance σ² / Δ_n: completing the square in the Girsanov density above.
        start, rate = x[..., :-1, :], (x[..., 1:, :] - x[..., :-1, :]) / dt[:, None]
        seen = ~torch.isnan(rate).any(-1)
        starts.append(start[seen])
        rates.append(rate[seen])
        relative.append((1.0 / dt).expand(seen.shape)[seen])
    visited = torch.cat(starts)
    check_nonempty(visited, "the steps between states that aren't missing")
    sites = cloud.sites(visited)
    components = sites.to_tangent(torch.cat(rates).to(cloud.device))
    return Observations(sites, components[None], torch.cat(relative).to(cloud.device))


def quadratic_variation(observations: Observations) -> tuple[float, float]:
    r"""Return the diffusion estimated from squared increments, and its standard error.

    .. math:: \hat\sigma^2=\frac1{mN}\sum_n\frac{|T_n^\top\Delta X_n|^2}{\Delta_n},\qquad
        \mathrm{se}(\hat\sigma)=\frac{\hat\sigma}{\sqrt{2mN}}

    The drift adds a term of the order of the step; evidence, which knows the drift, gives the better estimate.
    """
    squares = observations.components[0] ** 2 / observations.relative[:, None]
    sigma = float(squares.mean().sqrt())
    return sigma, sigma / (2.0 * squares.numel()) ** 0.5


def cloud_of_paths(paths: Any, spacing: float = 0.03, **options: Any) -> PointCloud:
    """Build a cloud out of the places that trajectories visited, thinned to even spacing.

    Args:
        paths: The trajectories, as in :func:`path_observations`.
        spacing: The spacing of the points, as a share of the diagonal of the bounding box.
        options: Further arguments of :class:`PointCloud`.
    """
    visited = torch.cat([x.reshape(-1, x.shape[-1]) for _, x in trials_of(paths)])
    visited = visited[~torch.isnan(visited).any(-1)].cpu()
    chosen = farthest_points(visited, spacing=spacing)
    return PointCloud(visited[torch.as_tensor(chosen)], **options)
