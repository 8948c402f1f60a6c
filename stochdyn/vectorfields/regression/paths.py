r"""Trajectories as data: their Girsanov likelihood is Gaussian regression on increments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_event_size, check_finite, check_ndim, check_nonempty, check_time_grid
from stochdyn.core.law.path import PathSample
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.graph import farthest_points
from stochdyn.vectorfields.regression._input import as_count, as_float_tensor
from stochdyn.vectorfields.regression.engines import Observations

__all__ = ["cloud_of_paths", "path_observations", "quadratic_variation"]


def _unpack(paths: Any) -> tuple[Tensor, Tensor]:
    """Return the grid ``(T,)`` and states ``(*sample, T, D)`` of a PathSample or a pair of both."""
    if isinstance(paths, PathSample):
        ts, x = paths.ts, paths.x
    elif isinstance(paths, tuple | list) and len(paths) == 2:
        ts, x = as_float_tensor(paths[0], "ts"), as_float_tensor(paths[1], "x")
    else:
        raise InvalidInputError(
            "paths must be a PathSample or a pair of times and states", got=type(paths).__name__
        )
    check_time_grid(ts)
    check_ndim(x, tuple(range(2, 13)), "x", "(*sample, T, D)")
    check_nonempty(x, "x")
    check_event_size(x, ts.shape[0], "x", axis=-2)
    check_finite(x.detach(), "x")
    return ts.detach().double(), x.detach().double()


def path_observations(cloud: PointCloud, paths: Any, stride: int = 1) -> Observations:
    r"""Turn trajectories into observations of their drift.

    For :math:`dX=b(X)\,dt+\sigma\,dW` in the tangent spaces, the Girsanov density of a path with respect to the driftless one is

    .. math:: \log\frac{dP_b}{dP_0}=\frac1{\sigma^2}\sum_n\Big(b(X_n)\cdot\Delta X_n-\tfrac12|b(X_n)|^2\Delta_n\Big),

    a quadratic in b: the likelihood of values :math:`y_n=T_n^\top\Delta X_n/\Delta_n` with noise of variance
    :math:`\sigma^2/\Delta_n`. So a Gaussian-process prior on b has an exact posterior. Normal parts of increments, which only
    show how the manifold bends, are dropped.

    Args:
        cloud: the points.
        paths: a :class:`~stochdyn.PathSample`, or ``(ts, x)`` with ``ts (T,)`` and ``x (*sample, T, D)``.
        stride: use every so manyth state; coarser steps cost accuracy of the Euler likelihood, and save rows.

    Returns:
        One row of components a step, with relative variances :math:`1/\Delta_n`.
    """
    ts, x = _unpack(paths)
    check_event_size(x, cloud.ambient_dim, "x")
    stride = as_count(stride, "stride")
    ts, x = ts[::stride], x[..., ::stride, :]
    if len(ts) < 2:
        raise InvalidInputError("the stride leaves no step", got=stride)
    dt = ts[1:] - ts[:-1]
    start = x[..., :-1, :]
    rates = ((x[..., 1:, :] - start) / dt[:, None]).reshape(-1, cloud.ambient_dim)
    sites = cloud.sites(start.reshape(-1, cloud.ambient_dim))
    relative = (1.0 / dt).expand(start.shape[:-1]).reshape(-1)
    components = sites.to_tangent(rates.to(cloud.device))
    return Observations(sites, components[None], relative.to(cloud.device))


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
        paths: as in :func:`path_observations`.
        spacing: of the points, as a share of the diagonal of the bounding box.
        options: of :class:`PointCloud`.
    """
    _, x = _unpack(paths)
    visited = x.reshape(-1, x.shape[-1]).cpu().numpy()
    chosen = farthest_points(visited, spacing=spacing)
    return PointCloud(torch.as_tensor(visited[chosen]), **options)
