"""Means and covariances of reaction networks by Gaussian moment closure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from stochdyn._checks import as_time_grid
from stochdyn.errors import NonFiniteError, TimeGridError

if TYPE_CHECKING:
    from stochdyn.jumps.reactions import ReactionNetwork

__all__ = ["Moments", "closed_moments"]


class Moments(NamedTuple):
    """Mean and covariance of counts at times.

    Attributes:
        mean: The means ``(T, M)``.
        covariance: The covariances ``(T, M, M)``.
    """

    mean: Tensor
    covariance: Tensor


def closed_moments(network: ReactionNetwork, ts: object) -> Moments:
    r"""Return mean and covariance of the counts under Gaussian closure.

    .. math:: \dot m=\nu^\top\bar a,\qquad \dot\Sigma=\Sigma\bar J^\top+\bar J\Sigma+\nu^\top\mathrm{diag}(\bar a)\,\nu,\qquad
        \Sigma\bar J^\top=\mathrm{cov}(X,a(X))\,\nu

    with :math:`\bar a=E[a(X)]` and the covariance taken for Gaussian X, by a cubature rule that is exact
    for propensities up to second order.

    Args:
        network: The network.
        ts: The times ``(T,)``, none before the start.
    """
    grid = as_time_grid(ts, min_points=1, like=network.start).double()
    if float(grid[0]) < network.start_time:
        raise TimeGridError(
            "ts starts before the law", got=float(grid[0]), expected=f">= {network.start_time:g}"
        )
    size = len(network.species)
    nu = network.change.double()

    def flow(_t: float, flat: np.ndarray) -> np.ndarray:
        m, cov = torch.tensor(flat[:size]), torch.tensor(flat[size:]).reshape(size, size)
        values, vectors = torch.linalg.eigh(0.5 * (cov + cov.mT))
        # points m +- sqrt(M) times the columns of a root of the covariance: all moments up to the third are Gaussian
        spread = math.sqrt(size) * (vectors * values.clamp(min=0.0).sqrt()).mT
        gaps = torch.cat([spread, -spread])
        a = network.continuous(m + gaps)
        mean, cross = a.mean(0), gaps.mT @ a / len(gaps) @ nu
        growth = cross + cross.mT + (nu.mT * mean) @ nu
        return torch.cat([nu.mT @ mean, growth.reshape(-1)]).numpy()

    begin = np.concatenate([network.start.numpy(), np.zeros(size * size)])
    scale = float(network.start.max()) or 1.0
    with torch.no_grad():
        found = solve_ivp(
            flow,
            (network.start_time, max(float(grid[-1]), network.start_time + 1e-300)),
            begin,
            method="LSODA",
            t_eval=grid.numpy(),
            rtol=1e-8,
            atol=1e-10 * scale,
        )
    if not found.success or not np.isfinite(found.y).all():
        raise NonFiniteError(
            "the closed moments diverge", hint="Gaussian closure doesn't hold here: use truncate"
        )
    y = torch.as_tensor(found.y.T)
    return Moments(y[:, :size], y[:, size:].reshape(-1, size, size))
