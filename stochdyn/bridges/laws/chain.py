r"""Linear-Gaussian processes on a grid, pinned at both ends: densities, moments, drifts and draws.

The reference between two snapshots, or its linearisation about a path, is a chain

.. math:: X_{k+1}\mid X_k\sim N(A_kX_k+c_k,\,Q_k),\qquad X_K\mid X_k\sim N(\Psi_kX_k+D_k,\,R_k),

one for every pair of end points or one for all of them. Pairs are the last axis: ``(K, d, d, P)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.gaussian.batch_last import cholesky, identity, inverse, log_det, mm, mt, mv, quadratic

__all__ = ["Chain", "PinnedChain", "panel_rule"]

# Two-point Gauss-Legendre rule on [0, 1].
_OFFSET = 0.5 - 0.5 / math.sqrt(3)


def panel_rule(start: float, end: float, step: float) -> tuple[Tensor, Tensor]:
    """Return a grid from ``start`` to ``end`` whose inner points are the nodes of a quadrature rule, and its weights.

    Composite two-point Gauss rule: fourth order, and no node at the ends, where the drift of a pinned process
    is infinite. Inner spacings are at most about ``step``.

    Returns:
        ``(K + 1,)`` times and ``(K - 1,)`` weights, in double precision.
    """
    panels = max(2, math.ceil((end - start) / (2 * step)))
    width = (end - start) / panels
    left = start + width * torch.arange(panels, dtype=torch.float64)
    nodes = torch.stack((left + width * _OFFSET, left + width * (1 - _OFFSET)), -1).flatten()
    ends = torch.tensor([start, end], dtype=torch.float64)
    return torch.cat((ends[:1], nodes, ends[1:])), torch.full((2 * panels,), width / 2, dtype=torch.float64)


@dataclass(frozen=True)
class Chain:
    """A linear-Gaussian process on the grid ``ts (K+1,)``, for ``P`` pairs of ends or one for all.

    Attributes:
        ts: The times of the grid, ``(K+1,)``, in double precision.
        matrix: The matrices ``A`` of the steps, ``(K, d, d, P)``.
        shift: The shifts ``c`` of the steps, ``(K, d, P)``.
        noise: The covariances ``Q`` of the steps, ``(K, d, d, P)``.
        to_end: The matrices ``Psi`` that lead from each time to the end, ``(K+1, d, d, P)``.
        end_shift: The shifts ``D`` from each time to the end, ``(K+1, d, P)``.
        end_noise: The covariances ``R`` of the end given the state at each time, ``(K+1, d, d, P)``, zero at the end.
        slope: The Jacobians ``J`` of the drift ``J z + h``, ``(K+1, d, d, P)``.
        level: The levels ``h`` of the drift, ``(K+1, d, P)``.
        spread: The covariance rate of the noise, ``(d, d)``.
    """

    ts: Tensor
    matrix: Tensor
    shift: Tensor
    noise: Tensor
    to_end: Tensor
    end_shift: Tensor
    end_noise: Tensor
    slope: Tensor
    level: Tensor
    spread: Tensor

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y | x) (P,)`` for ends ``x, y (d, P)``."""
        # log N(y; Psi_0 x + D_0, R_0)
        gap = y - mv(self.to_end[0], x) - self.end_shift[0]
        precision = inverse(self.end_noise[0])
        constant = log_det(self.end_noise[0]) + self.spread.shape[0] * math.log(2 * math.pi)
        return -0.5 * (quadratic(gap, precision) + constant)

    def whitened(self, x: Tensor, y: Tensor) -> Tensor:
        """Return how far ``y`` is from where ``x`` is expected, in units of the noise, ``(d, P)``."""
        gap = (y - mv(self.to_end[0], x) - self.end_shift[0]).mT[..., None]
        factor = cholesky(self.end_noise[0]).movedim(-1, 0)
        return torch.linalg.solve_triangular(factor, gap, upper=False).squeeze(-1).mT

    def pin(self, y: Tensor) -> PinnedChain:
        """Condition on the end ``y (d, P)``."""
        # X_{k+1} given X_k and the end: with K = Q Psi^T R_k^{-1} its mean is (I - K Psi)(A x + c) + K (y - D), and Joseph's form of
        # its covariance stays positive; the drift gains GG^T grad log p(y | x) = GG^T Psi^T R^{-1} (y - Psi x - D)
        last = mt(self.to_end[1:])
        gain = mm(mm(self.noise, last), inverse(self.end_noise[:-1]))
        keep = identity(gain) - mm(gain, self.to_end[1:])
        noise = mm(mm(keep, self.noise), mt(keep)) + mm(mm(gain, self.end_noise[1:]), mt(gain))
        shift = mv(keep, self.shift) + mv(gain, y - self.end_shift[1:])
        pull = mm(
            mm(self.spread[..., None].to(gain.dtype), mt(self.to_end[:-1])), inverse(self.end_noise[:-1])
        )
        slope = self.slope[:-1] - mm(pull, self.to_end[:-1])
        level = self.level[:-1] + mv(pull, y - self.end_shift[:-1])
        return PinnedChain(self.ts, mm(keep, self.matrix), shift, noise, slope, level)


@dataclass(frozen=True)
class PinnedChain:
    """A chain whose end is known.

    Attributes:
        ts: The times of the grid, ``(K+1,)``.
        matrix: The matrices of the mean of the next state, ``(K, d, d, P)``.
        shift: The shifts of the mean of the next state, ``(K, d, P)``.
        noise: The covariances of the next state, ``(K, d, d, P)``.
        slope: The Jacobians of the drift, ``(K, d, d, P)``; the drift is ``slope z + level`` at the first ``K`` times.
        level: The levels of the drift, ``(K, d, P)``.
    """

    ts: Tensor
    matrix: Tensor
    shift: Tensor
    noise: Tensor
    slope: Tensor
    level: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean path ``(K+1, d, P)`` from ``x (d, P)``."""
        path = [x]
        for matrix, shift in zip(self.matrix, self.shift, strict=True):
            path.append(mv(matrix, path[-1]) + shift)
        return torch.stack(path)

    def covariance(self) -> Tensor:
        """Return the covariances ``(K+1, d, d, P)`` of the states."""
        now = torch.zeros_like(self.noise[0])
        values = [now]
        for matrix, noise in zip(self.matrix, self.noise, strict=True):
            now = mm(mm(matrix, now), mt(matrix)) + noise
            values.append(now)
        return torch.stack(values)

    def drift(self, k: int, z: Tensor) -> Tensor:
        """Return the drift ``(d, P)`` at time ``k`` and states ``z (d, P)``."""
        return mv(self.slope[k], z) + self.level[k]

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw one path per pair; returns states ``(K+1, d, P)`` and innovations ``(K, d, P)``."""
        shape = (self.matrix.shape[0], *x.shape)
        draws = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        noises = mv(cholesky(self.noise), draws)
        path = [x]
        for matrix, shift, noise in zip(self.matrix, self.shift, noises, strict=True):
            path.append(mv(matrix, path[-1]) + shift + noise)
        return torch.stack(path), noises
