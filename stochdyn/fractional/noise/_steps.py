"""Exact steps of Ornstein-Uhlenbeck states that share one Brownian motion: what the grid alone decides."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochdyn._caching import cached
from stochdyn._checks import check_time_grid, check_type
from stochdyn.core.sde.grids import remembered
from stochdyn.errors import TimeGridError
from stochdyn.fractional.noise._quadrature import graded_nodes, levels_for, relative_exponential_mean

__all__ = ["StepFactors", "stationary_factor", "step_factors"]

_DROPPED = (
    1e-5  # innovations with a smaller standard deviation, relative to those of dW or the states, are left out
)


class StepFactors(NamedTuple):
    """What the grid alone decides, float64: step sizes, loads, decays and their differences from 1."""

    dt: Tensor  # (N,)
    load: Tensor  # (N, R, K)
    decay: Tensor  # (N, K)
    loss: Tensor  # (N, K), decay - 1


@cached(32)
def _decompose(speeds: tuple[float, ...], steps: bytes) -> StepFactors:
    """Exact joint law of (dW, xi_1..xi_K) over each step, as loads on independent innovations of variance dt.

    The conditional covariance of xi given dW is dt Cov_u(e^(-x_i u), e^(-x_j u)) with x = gamma dt and u
    uniform on [0, 1]. A quadrature for it is a factor already; its singular value decomposition gives the
    innovations.
    """
    dt = torch.from_numpy(np.frombuffer(steps, dtype=np.float64).copy())
    gamma = torch.tensor(speeds, dtype=torch.float64)
    # steps that differ by rounding share one decomposition
    rounded = torch.from_numpy(np.array([float(f"{s:.9e}") for s in dt.tolist()]))
    unique, inverse = torch.unique(rounded, return_inverse=True)
    x = unique[:, None] * gamma
    mean = relative_exponential_mean(x)
    u, w = graded_nodes(levels_for(float(x.max())))
    centred = torch.expm1(-x[:, None, :] * u[:, None]) - (mean - 1)[:, None, :]
    # in units of the states' own spread, so that none is too fast to have an innovation
    unit = (1 + 2 * x).rsqrt()[:, None, :]
    _, s, vh = torch.linalg.svd(centred / unit * w.sqrt()[:, None], full_matrices=False)
    rank = int((s > _DROPPED).sum(-1).max())
    load = torch.cat([mean[:, None, :], s[:, :rank, None] * vh[:, :rank, :] * unit], dim=1)[inverse]
    exponent = -dt[:, None] * gamma
    return StepFactors(dt, load, torch.exp(exponent), torch.expm1(exponent))


def step_factors(speeds: tuple[float, ...], horizon: float, ts: Tensor) -> StepFactors:
    """Return the factors of a grid on its device; checked and computed once per tensor ``ts``."""

    def factors() -> StepFactors:
        check_time_grid(ts)
        span = (ts[-1] - ts[0]).item()
        if span > horizon * (1 + 1e-6):
            raise TimeGridError(
                "ts extends past the horizon of the noise",
                got=f"a span of {span:g}",
                expected=f"at most {horizon:g}",
                hint=f"build MarkovNoise with horizon={span:g} or more, so that its weights cover it",
            )
        host = ts.detach().to("cpu", torch.float64)
        found = _decompose(speeds, (host[1:] - host[:-1]).numpy().tobytes())
        return StepFactors(*(t.to(ts.device) for t in found))

    check_type(ts, Tensor, "ts")
    return remembered(ts.detach() if ts.requires_grad else ts, ("noise", speeds, horizon), factors)


@cached(32)
def stationary_factor(speeds: tuple[float, ...]) -> Tensor:
    """Factor ``(Q, K)`` of the stationary covariance; the correlations depend on ratios of speeds only."""
    g = torch.tensor(speeds, dtype=torch.float64)
    moving = g > 0  # a state of speed 0 is W itself; where it starts is of no effect
    r = g[moving]
    scale = (2 * r).rsqrt()
    correlation = 2 * (r[:, None] * r[None, :]).sqrt() / (r[:, None] + r[None, :])
    lower, info = torch.linalg.cholesky_ex(correlation)
    root = lower.T
    if info or float(lower.diagonal().min()) < 1e-6:  # speeds that are nearly dependent
        values, vectors = torch.linalg.eigh(correlation)
        keep = values > 1e-14 * values[-1]
        root = (vectors[:, keep] * values[keep].sqrt()).T
    factor = torch.zeros(root.shape[0], g.shape[0], dtype=torch.float64)
    factor[:, moving] = root * scale
    return factor
