"""Quadrature on one step, graded towards its end where fast exponentials live."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stochdyn._caching import cached

__all__ = ["graded_nodes", "levels_for", "relative_exponential_mean"]

_POINTS = 16


@cached(64)
def graded_nodes(levels: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on [0, 1]: 16 points on each of [0, 2^-m], [2^-m, 2^(1-m)], ..., [1/2, 1].

    With ``levels`` m = log2 of the largest rate, products of exponentials ``exp(-x u)`` up to that rate are
    integrated to about 1e-15 (Gauss-Legendre).
    """
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    edges = np.concatenate([[0.0], 2.0 ** np.arange(-levels, 1)])
    width = np.diff(edges)[:, None]
    u = edges[:-1, None] + width * (nodes + 1) / 2
    w = width * weights / 2
    return torch.from_numpy(u.reshape(-1).copy()), torch.from_numpy(w.reshape(-1).copy())


def levels_for(largest: float) -> int:
    """Return the grading that resolves rates up to ``largest`` (per step)."""
    return max(1, math.ceil(math.log2(max(largest, 1.0))) + 1)


def relative_exponential_mean(x: Tensor) -> Tensor:
    """Return (1 - e^-x) / x, the mean of e^(-xu) over u in [0, 1]; entire, 1 at 0, differentiable there."""
    small = x.abs() < 1e-2
    xs = torch.where(small, x, torch.zeros_like(x))
    xl = torch.where(small, torch.ones_like(x), x)
    series = 1 - xs / 2 * (1 - xs / 3 * (1 - xs / 4 * (1 - xs / 5 * (1 - xs / 6 * (1 - xs / 7)))))
    return torch.where(small, series, -torch.expm1(-xl) / xl)
