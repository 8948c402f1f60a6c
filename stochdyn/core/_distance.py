"""Distances between points that keep their digits: no expanded square, which cancels far from the origin."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distance_between", "squared_distance"]


def distance_between(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances ``(*B, n, m)`` of points ``x (*B, n, d)`` and ``y (*B, m, d)``."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the squares of the distances, ``(*B, n, m)``."""
    return distance_between(x, y).square()
