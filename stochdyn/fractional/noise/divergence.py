"""How far the law of approximate increments is from that of fractional Brownian motion, in nats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn.errors import ApproximationWarning
from stochdyn.fractional.exact.fbm import fbm_covariance
from stochdyn.fractional.noise.covariance import markov_covariance
from stochdyn.fractional.noise.moments import Kind

if TYPE_CHECKING:
    from stochdyn.fractional.noise.memory import MemoryStates

__all__ = ["Divergence", "divergence_on", "gaussian_divergence", "warn_if_crude"]

_CRUDE = 1e-3  # nats per step from which a warning comes: a Hurst index inferred from exact data may be off by some hundredths
_PROBE_STEPS = 32
ScaledNoise = Callable[[Tensor], Tensor]  # times (N,) to covariance (N, N)


class Divergence(float):
    """Kullback-Leibler divergence of exact increments from approximate ones, in nats: a number, that of a whole path.

    It is the expected log likelihood that exact data lose under the approximation, so it bounds what the approximation
    can do to any inference from such data.

    Attributes:
        per_path: The nats per path on the grid.
        per_step: The nats per step of the grid.
        num_steps: The number of steps of the grid.
    """

    num_steps: int

    def __new__(cls, per_path: float, num_steps: int) -> Divergence:
        """Note the size of the grid beside the number."""
        new = super().__new__(cls, per_path)
        new.num_steps = num_steps
        return new

    @property
    def per_path(self) -> float:
        """Nats per path."""
        return float(self)

    @property
    def per_step(self) -> float:
        """Nats per step."""
        return float(self) / self.num_steps

    def __repr__(self) -> str:
        return f"Divergence(per_path={self.per_path:.3g}, per_step={self.per_step:.3g})"


def increments_of(covariance: Tensor) -> Tensor:
    """Return the covariance of increments ``(*batch, N, N)``, the first from 0, of a path's covariance ``(*batch, N, N)``."""
    rows = torch.cat([covariance[..., :1, :], covariance.diff(dim=-2)], dim=-2)
    return torch.cat([rows[..., :1], rows.diff(dim=-1)], dim=-1)


def gaussian_divergence(exact: Tensor, approximate: Tensor) -> Tensor:
    r"""Return KL(N(0, LL') || N(0, C)) from the factor L ``(*batch, N, N)`` and C ``(*batch, N, N)``; inf if C is singular.

    .. math:: \tfrac12\left[\operatorname{tr}C^{-1}LL^\top-N\right]+\log\det C^{1/2}-\log\det L.
    """
    factor, info = torch.linalg.cholesky_ex(approximate)
    ratio = torch.linalg.solve_triangular(factor, exact, upper=False)
    trace = ratio.square().sum((-2, -1)) - exact.shape[-1]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log() - exact.diagonal(dim1=-2, dim2=-1).log()
    found = 0.5 * trace + log_det.sum(-1)
    return torch.where(info == 0, found.clamp_min(0.0), torch.inf)


@cached(64)
def unit_grid_factor(hurst: float, num_steps: int, kind: Kind) -> Tensor:
    """Return the Cholesky factor of the increments of fBM over steps of length 1."""
    ts = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return torch.linalg.cholesky(increments_of(fbm_covariance(ts, hurst, kind)))


def divergence_on(times: Tensor, covariance: Tensor, hurst: Tensor, kind: Kind) -> Tensor:
    """Return nats per path ``(*batch)`` on positive times ``(N,)``, for ``covariance (*batch, N, N)`` at these times."""
    flat = covariance.reshape(-1, *covariance.shape[-2:])
    indices = hurst.expand(covariance.shape[:-2]).reshape(-1)
    found = []
    for index, row in zip(indices, flat, strict=True):
        # in units of the last time, so that no power of a unit enters
        exact = fbm_covariance(times / times[-1], index, kind)
        factor = torch.linalg.cholesky(increments_of(exact))
        found.append(gaussian_divergence(factor, increments_of(row / times[-1] ** (2 * index))))
    return torch.stack(found).reshape(covariance.shape[:-2])


def _crudeness(noise: ScaledNoise, horizon: float, dt: float, hurst: float, kind: Kind) -> float:
    """Return the largest divergence in nats per step over short stretches: of steps dt, of long steps, and of some between."""
    count = max(2, min(_PROBE_STEPS, round(horizon / dt)))
    longest = horizon / count
    lengths = {min(dt, longest), math.sqrt(min(dt, longest) * longest), longest}
    exact = unit_grid_factor(hurst, count, kind)
    times = torch.arange(1, count + 1, dtype=torch.float64)
    found = [
        gaussian_divergence(exact, increments_of(noise(times * length)) / length ** (2 * hurst))
        for length in lengths
    ]
    return float(torch.stack(found).max()) / count


def warn_if_crude(noise: MemoryStates, hurst: Tensor, stacklevel: int) -> None:
    """Warn if the law of short stretches of the noise is far from that of fractional Brownian motion."""
    weights = noise._solver()(hurst.to(torch.float64))[0].detach().cpu().reshape(-1, noise.num_states)
    indices = hurst.to("cpu", torch.float64).reshape(-1).tolist()
    worst, where = 0.0, 0.5
    for index in {min(indices), max(indices)}:
        w = weights[indices.index(index)]
        law = partial(markov_covariance, w=w, g=noise.speeds, kind=noise.kind)
        found = _crudeness(law, noise.horizon, noise.dt, index, noise.kind)
        if not found <= worst:
            worst, where = found, index
    if worst > _CRUDE:
        cure = "take more states (num_states), at the default speeds"
        warnings.warn(
            f"the Markov approximation of fractional noise loses {worst:.2g} nats per step at a Hurst index of {where:.3g} "
            f"(type {noise.kind}, {noise.num_states} states, speeds {noise._speeds[0]:.3g} to {noise._speeds[-1]:.3g}, "
            f"horizon {noise.horizon:g}, dt {noise.dt:g}), so Hurst indices inferred with it are biased; {cure}",
            ApproximationWarning,
            stacklevel=stacklevel + 1,
        )
