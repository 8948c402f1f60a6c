"""Exact bridges of processes driven by fractional Brownian motion, by dense algebra on a fine grid."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import hyp2f1

from stochdyn.fractional import fbm_covariance

__all__ = ["exact_bridge"]


def _riemann_liouville(ts: np.ndarray, hurst: float) -> np.ndarray:
    """Covariance of unit type II fractional Brownian motion."""
    low, high = np.minimum.outer(ts, ts), np.maximum.outer(ts, ts)
    a = hurst + 0.5
    ratio = low / high
    np.fill_diagonal(ratio, 0.5)
    cov = 2 * hurst * low**a * high ** (a - 1) / a * hyp2f1(1 - a, 1.0, a + 1, ratio)
    np.fill_diagonal(cov, ts ** (2 * hurst))
    return cov


def exact_bridge(
    hurst: float,
    theta: float,
    kind: str,
    at: list[float],
    end: float,
    value: float,
    scale: float,
    n: int = 1200,
) -> tuple[list[float], float]:
    r"""Return posterior standard deviations at ``at`` and the log evidence.

    X starts at 0, :math:`dX=-\theta X\,dt+dB^H`, and ``value`` is observed at ``end`` with noise ``scale``.
    :math:`X_t=B_t-\theta\int_0^te^{-\theta(t-s)}B_s\,ds` by the trapezoid rule on ``n`` steps.
    """
    ts = end * np.arange(1, n + 1) / n
    cov = (
        fbm_covariance(torch.from_numpy(ts), hurst, kind="I").numpy()
        if kind == "I"
        else _riemann_liouville(ts, hurst)
    )
    if theta:
        lag = ts[:, None] - ts[None, :]
        weight = np.where(lag >= 0, np.exp(-theta * np.clip(lag, 0, None)), 0.0) * end / n
        weight[np.arange(n), np.arange(n)] *= 0.5
        move = np.eye(n) - theta * weight
        cov = move @ cov @ move.T
    index = [round(t / end * n) - 1 for t in at]
    total = cov[-1, -1] + scale**2
    std = [math.sqrt(cov[i, i] - cov[i, -1] ** 2 / total) for i in index]
    return std, -0.5 * (value**2 / total + math.log(2 * math.pi * total))
