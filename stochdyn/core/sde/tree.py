"""One Brownian path for every grid and every batch: increments that are a function of a seed, the place of a path, and time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_sample_shape, as_seed, as_time_grid, check_positive_int, check_real
from stochdyn.errors import InvalidInputError, TimeGridError

__all__ = ["BrownianTree"]


class BrownianTree:
    r"""Brownian paths that don't depend on the grid on which they are asked for, nor on how many others are.

    A path is built by Lévy's construction: its end, then midpoints of halves of halves. The normal number of a midpoint is a function
    of the seed, the place of the path in the sample and the midpoint, by a hash, so a finer grid refines the same path, and path 3
    of 5 is path 3 of 5000. Use it to compare steps, methods or parameters on the same noise.

    Args:
        start_time: The time at which paths are zero.
        horizon: The time at which they end.
        seed: The seed of all paths.
        depth: The number of halvings, which sets the work for a time. The joint law is exact for times no two of which lie within
            one of the ``2**depth`` cells.

    Raises:
        InvalidInputError: If the span isn't positive.

    Example:
        >>> tree = BrownianTree(0.0, 1.0, seed=3)
        >>> fine, coarse = tree.increments(torch.linspace(0, 1, 9), 2), tree.increments([0.0, 0.5, 1.0], 5)
        >>> torch.allclose(fine.reshape(2, 4, 2, 1).sum(1), coarse[:, :2])
        True

    Reference:
        Lévy, "Processus stochastiques et mouvement brownien", 1948; Gaines and Lyons, "Variable step size control in the numerical
        solution of stochastic differential equations", 1997; for the hash: Steele, Lea and Flood, "Fast splittable pseudorandom
        number generators", 2014.
    """

    def __init__(self, start_time: float, horizon: float, seed: int = 0, depth: int = 24) -> None:
        check_real(start_time, "start_time", fixed=True)
        check_real(horizon, "horizon", fixed=True)
        check_positive_int(depth, "depth")
        if not float(horizon) > float(start_time):
            raise InvalidInputError("horizon must lie after start_time", got=f"{float(horizon):g}")
        self.start_time, self.horizon = float(start_time), float(horizon)
        self.seed, self.depth = as_seed(seed), depth

    def increments(
        self, ts: Tensor | Sequence[float], sample_shape: int | Sequence[int] = (), channels: int = 1
    ) -> Tensor:
        """Return the increments ``(T-1, *sample, m)`` over the steps of a grid, as ``law.drive(ts, x0, dw)`` takes them.

        Args:
            ts: The strictly increasing times ``(T,)``.
            sample_shape: The shape of the paths, an integer or a tuple; a batch counts as part of it.
            channels: The number m of noise channels.

        Raises:
            TimeGridError: If a time lies outside the span of the tree.
        """
        values = self.values(ts, sample_shape, channels)
        return values[1:] - values[:-1]

    def values(
        self, ts: Tensor | Sequence[float], sample_shape: int | Sequence[int] = (), channels: int = 1
    ) -> Tensor:
        """Return the paths ``(T, *sample, m)`` at times; arguments as in :meth:`increments`."""
        grid, shape = as_time_grid(ts, min_points=1), as_sample_shape(sample_shape)
        check_positive_int(channels, "channels")
        place = self._place(grid)
        paths = np.ones(shape, dtype=np.uint64) * _mixed(np.uint64(self.seed) + _STEP)
        for axis, size in enumerate(shape):
            index = np.arange(1, size + 1, dtype=np.uint64).reshape(-1, *(1,) * (len(shape) - axis - 1))
            paths = _mixed(paths + index * _STEP)
        keys = _mixed(paths[..., None] + np.arange(1, channels + 1, dtype=np.uint64) * _STEP)
        found = _levy(keys, place, self.depth) * (self.horizon - self.start_time) ** 0.5
        return torch.as_tensor(found, device=grid.device).to(grid.dtype)

    def _place(self, grid: Tensor) -> np.ndarray:
        """Return times in units of the finest cells; those that a cell begins at, up to rounding, are whole numbers."""
        span = self.horizon - self.start_time
        share = (grid.detach().cpu().double().numpy() - self.start_time) / span
        rounding = 4 * np.finfo(float).eps * max(abs(self.start_time), abs(self.horizon)) / span
        slack = max(rounding, 4 * torch.finfo(grid.dtype).eps)
        if share[0] < -slack or share[-1] > 1 + slack:
            raise TimeGridError(
                "the grid leaves the span of the tree",
                got=f"{float(grid[0]):g} to {float(grid[-1]):g}",
                expected=f"{self.start_time:g} to {self.horizon:g}",
            )
        place = share.clip(0, 1) * 2.0**self.depth
        near = np.round(place)
        return np.where(np.abs(place - near) <= 2.0**self.depth * rounding, near, place)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray | np.uint64) -> np.ndarray:
    """Return a hash of 64-bit numbers: the mixing function of SplitMix64."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _normal(keys: np.ndarray, nodes: np.ndarray | np.uint64) -> np.ndarray:
    """Return the standard normal numbers of nodes for paths, by Box and Muller's transform of two hashes."""
    with np.errstate(over="ignore"):
        first, second = (_mixed(keys + (np.uint64(2) * nodes + np.uint64(k)) * _STEP) for k in (0, 1))
    # 53 bits each, the first one never zero.
    u = ((first >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
    v = (second >> np.uint64(11)).astype(float) * 2.0**-53
    return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)


def _levy(keys: np.ndarray, place: np.ndarray, depth: int) -> np.ndarray:
    """Return paths ``(T, *sample, m)`` on the unit interval at places in units of the finest cells.

    Node 1 is the end, node ``2^k + j`` (shifted by one level) the midpoint of cell j of level k.
    """
    lead = (-1, *(1,) * keys.ndim)
    at = place.reshape(lead)
    low = np.zeros((len(place), *keys.shape))
    high = np.broadcast_to(_normal(keys, np.uint64(1)), low.shape).copy()
    begin, length = np.zeros(at.shape), 2.0**depth
    cell = np.zeros(at.shape, dtype=np.uint64)
    for k in range(depth):
        if bool(((at == begin) | (at == begin + length)).all()):
            break
        node = np.uint64(2 ** (k + 1)) + cell
        # A midpoint is the mean of its ends, with a standard deviation of half the root of the cell's length.
        middle = 0.5 * (low + high) + 0.5 * 2.0 ** (-k / 2) * _normal(keys, node)
        length = length / 2
        right = at >= begin + length
        low, high = np.where(right, middle, low), np.where(right, high, middle)
        begin = np.where(right, begin + length, begin)
        cell = np.uint64(2) * cell + right.astype(np.uint64)
    part = (at - begin) / length
    inside = (part > 0) & (part < 1)
    mean = low + part * (high - low)
    if not bool(inside.any()):
        return mean
    # Within a finest cell a time has the variance of the bridge.
    bridge = np.sqrt(part * (1 - part) * length * 2.0**-depth)
    return mean + bridge * _normal(keys, np.uint64(2 ** (depth + 1)) + cell)
