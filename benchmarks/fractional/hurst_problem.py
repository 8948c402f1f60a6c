"""Noisy fractional Ornstein-Uhlenbeck series, a Pyro model of them, and the Cramér-Rao bound of their Hurst index."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import Scalar
from stochdyn.fractional import FractionalOU, MarkovNoise
from stochdyn.infer import sample_path

__all__ = [
    "NOISE",
    "RATE",
    "SCALE",
    "STATES",
    "STEP",
    "cramer_rao",
    "grid",
    "model",
    "path_noise",
    "simulate",
    "truth",
]

RATE, SCALE, NOISE, STEP = 1.0, 1.0, 0.05, 0.05
#: Memory states of the model. Six are too few for 1000 steps at H = 0.9: H comes out 0.035 too small.
STATES = 10


def simulate(hurst: float, n: int, seed: int) -> Tensor:
    """Return ``n`` noisy values every STEP of dX = -RATE X dt + SCALE dB^H from X(0) = 0, without time-step error."""
    g = torch.Generator().manual_seed(seed)
    x = truth(hurst, n).sample(_times(n), (), g).x[:, 0]
    return x + NOISE * torch.randn(n, generator=g, dtype=torch.float64)


def truth(hurst: float, n: int, rate: float = RATE, scale: float = SCALE) -> FractionalOU:
    """Return the law behind the data: exact steps, and many more and faster memory states than the model has."""
    noise = MarkovNoise(hurst, horizon=n * STEP, dt=STEP)
    return FractionalOU(rate, 0.0, scale, hurst, noise=noise, initial=0.0)


def cramer_rao(hurst: float, n: int) -> float:
    """Return the Cramér-Rao bound (standard deviation) of the Hurst index, rate and scale being unknown too.

    The information is the curvature of the exact Gaussian evidence, in expectation over the data.
    """
    ts, eps = _times(n), 1e-4

    def cov(h: float, log_rate: float, log_scale: float) -> Tensor:
        return truth(h, n, RATE * math.exp(log_rate), SCALE * math.exp(log_scale)).joint_covariance(ts)

    inverse = torch.linalg.inv(cov(hurst, 0, 0) + NOISE**2 * torch.eye(n, dtype=torch.float64))
    slopes = [
        inverse @ (cov(hurst + e[0], e[1], e[2]) - cov(hurst - e[0], -e[1], -e[2])) / (2 * eps)
        for e in (eps * torch.eye(3)).tolist()
    ]
    information = torch.tensor([[0.5 * float((a * b.T).sum()) for b in slopes] for a in slopes])
    return float(torch.linalg.inv(information.double())[0, 0].sqrt())


def model(ts: Tensor, y: Tensor) -> None:
    """Noisy fractional Ornstein-Uhlenbeck path with unknown Hurst index, rate and scale; ``ts`` begins at 0.

    The priors of rate and scale are wide, and half their width off the truth.
    """
    hurst = pyro.sample("hurst", dist.Uniform(y.new_tensor(0.0), 1.0))
    rate = pyro.sample("rate", dist.LogNormal(y.new_tensor(0.5), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(-0.5), 1.0))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, Scalar(scale), path_noise(hurst, y.shape[-1]))
    x = sample_path("x", sde, y.new_zeros(1), ts)
    pyro.sample("y", dist.Normal(x[..., 1:, 0], NOISE).to_event(1), obs=y)


def grid(n: int) -> Tensor:
    """Return the times of path and data, 0 included."""
    return STEP * torch.arange(n + 1, dtype=torch.float64)


def _times(n: int) -> Tensor:
    return STEP * torch.arange(1, n + 1, dtype=torch.float64)


def path_noise(hurst: Tensor | float, n: int, states: int = STATES) -> MarkovNoise:
    """Return the noise of the model."""
    return MarkovNoise(hurst, states, horizon=n * STEP, dt=STEP)
