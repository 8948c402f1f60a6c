r"""Transitions of the reference between two snapshots: exact for affine drifts, relinearised for others.

For a nonlinear drift every pair of particles has its own nominal path. About it the process is linear,

.. math:: dX=\big[b(\bar x_t)+\nabla b(\bar x_t)(X-\bar x_t)\big]dt+G\,dW,

its transition density Gaussian, and the mean of the pinned process is the next nominal path. A fixed point is the
most probable path, and the density Laplace's approximation about it.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.chain import Chain, panel_rule
from stochdyn.bridges.laws.importance import log_correction, weighted_paths
from stochdyn.core._distance import distance_between
from stochdyn.core.gaussian.batch_last import cholesky, mm, mt, mv
from stochdyn.core.gaussian.constant_steps import constant_transition

__all__ = ["AffineTransition", "LinearisedTransition", "Transition", "transition"]

_CHUNK_NUMBERS = 2**23
# Beyond this number of pairs each row has one nominal path, not each pair.
_MAX_PAIRS = 2**18


class Transition(ABC):
    """The reference process between the times ``start`` and ``end``.

    Args:
        family: The drift of the reference.
        spread: The covariance rate of the noise, ``(d, d)``.
        start: The time of the first snapshot.
        end: The time of the second snapshot.
        dt: The largest spacing of the inner time grid.
    """

    def __init__(self, family: DriftFamily, spread: Tensor, start: float, end: float, dt: float) -> None:
        self.family, self.spread, self.start, self.end, self.dt = family, spread, start, end, dt
        self.ts, self.quadrature = panel_rule(start, end, dt)

    @torch.no_grad()
    def chain(self, x: Tensor, y: Tensor, ts: Tensor | None = None) -> Chain:
        """Return the linear process for pairs of ends ``x, y (P, d)`` on ``ts`` (the own grid if None)."""
        return self._chain(x, y, self.ts if ts is None else ts)

    @abstractmethod
    def _chain(self, x: Tensor, y: Tensor, grid: Tensor) -> Chain: ...

    @abstractmethod
    def log_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y_b | x_a)``, ``(n, m)``, for ``x (n, d)`` and ``y (m, d)``."""


class AffineTransition(Transition):
    """The exact process of a drift :math:`Ax+c`, one chain for all pairs."""

    def __init__(self, family: DriftFamily, spread: Tensor, start: float, end: float, dt: float) -> None:
        super().__init__(family, spread, start, end, dt)
        affine = family.affine()
        assert affine is not None
        self.matrix, self.shift = (value.detach().to(spread) for value in affine)
        whole = torch.tensor([end - start], dtype=torch.float64, device=spread.device)
        phi, c, q = constant_transition(self.matrix, self.shift, spread, whole, spread.dtype)
        self.phi, self.constant, self.noise = phi[0], c[0], q[0]

    def whitened(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return both clouds in coordinates where the kernel is :math:`e^{-|x-y|^2/2}` but for :meth:`log_constant`."""
        factor = torch.linalg.cholesky(self.noise)
        expected = x @ self.phi.mT + self.constant
        return (
            torch.linalg.solve_triangular(factor, expected.mT, upper=False).mT.contiguous(),
            torch.linalg.solve_triangular(factor, y.mT, upper=False).mT.contiguous(),
        )

    def log_constant(self) -> Tensor:
        """Return the log of the normalising constant of the kernel."""
        return -0.5 * torch.logdet(2 * torch.pi * self.noise)

    def log_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the exact ``log p(y_b | x_a)``, ``(n, m)``."""
        before, after = self.whitened(x, y)
        distance = distance_between(before, after)
        return -0.5 * distance.square() + self.log_constant()

    def _chain(self, x: Tensor, y: Tensor, grid: Tensor) -> Chain:
        dtype, count = self.spread.dtype, len(grid)
        grid = grid.to(self.spread.device)
        phi, c, q = constant_transition(self.matrix, self.shift, self.spread, grid.diff(), dtype)
        psi, d, r = constant_transition(self.matrix, self.shift, self.spread, grid[-1] - grid, dtype)
        return Chain(
            grid,
            phi[..., None],
            c[..., None],
            q[..., None],
            psi[..., None],
            d[..., None],
            r[..., None],
            self.matrix[..., None].expand(count, -1, -1, 1),
            self.shift[..., None].expand(count, -1, 1),
            self.spread,
        )


class LinearisedTransition(Transition):
    """A nonlinear drift, linearised about a path of its own for every pair.

    Args:
        family: The drift of the reference.
        spread: The covariance rate of the noise, ``(d, d)``.
        start: The time of the first snapshot.
        end: The time of the second snapshot.
        dt: The largest spacing of the inner time grid.
        passes: The number of times that nominal paths are improved before the density is taken.
        corrections: The number of paths per pair for importance weights of the density, an even number; see
            :mod:`stochdyn.bridges.laws.importance`.

    Attributes:
        stiffness: The largest product of the step and the norm of the drift's Jacobian that was met last; the expansion means
            nothing far above one.
    """

    def __init__(
        self,
        family: DriftFamily,
        spread: Tensor,
        start: float,
        end: float,
        dt: float,
        passes: int = 2,
        corrections: int = 0,
    ) -> None:
        super().__init__(family, spread, start, end, dt)
        self.passes, self.corrections = passes, corrections
        self.stiffness = 0.0

    def _chain(self, x: Tensor, y: Tensor, grid: Tensor) -> Chain:
        x, y = x.mT.contiguous(), y.mT.contiguous()
        # from the straight line on, each pass takes the pinned mean for the next nominal path, and its drift for the velocity
        lam = ((grid - grid[0]) / (grid[-1] - grid[0])).to(x)[:, None, None]
        velocity = ((y - x) / float(grid[-1] - grid[0])).expand(len(grid), -1, -1)
        chain = self._linearise(x + lam * (y - x), velocity, grid)
        for _ in range(self.passes):
            pinned = chain.pin(y)
            nominal = pinned.mean(x)
            velocity = mv(pinned.slope, nominal[:-1]) + pinned.level
            last = 2 * (nominal[-1] - nominal[-2]) / float(grid[-1] - grid[-2]) - velocity[-1]
            chain = self._linearise(nominal, torch.cat((velocity, last[None])), grid)
        return chain

    def log_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y_b | x_a)``, ``(n, m)``, linearised for each pair; of many pairs by :meth:`log_kernel_by_rows`."""
        n, m, d = x.shape[0], y.shape[0], x.shape[1]
        if n * m > _MAX_PAIRS and not self.corrections:
            return self.log_kernel_by_rows(x, y)
        rows = max(1, _CHUNK_NUMBERS // (len(self.ts) * d * d * m))
        parts = []
        for own in x.split(rows):
            first = own[:, None].expand(-1, m, -1).reshape(-1, d)
            second = y.expand(own.shape[0], -1, -1).reshape(-1, d)
            chain = self.chain(first, second)
            density = chain.log_density(first.mT, second.mT)
            if self.corrections:
                density = density + self._correction(chain, first.mT, second.mT)
            parts.append(density.reshape(-1, m))
        return torch.cat(parts).reshape(n, m)

    @torch.no_grad()
    def log_kernel_by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y_b | x_a)``, linearised about the path without noise from each ``x_a`` rather than one for each pair.

        It costs one linearisation per row. What it leaves out is of second order in the distance of partners from where they are expected.
        """
        path, velocity, clock = [x], [], self.ts.to(x)
        for early, late in itertools.pairwise(clock):
            # Heun's rule for the path without noise, which is the pinned path of its own end: no passes are needed
            velocity.append(self.family(early, path[-1]))
            ahead = self.family(late, path[-1] + (late - early) * velocity[-1])
            path.append(path[-1] + 0.5 * (late - early) * (velocity[-1] + ahead))
        velocity.append(self.family(clock[-1], path[-1]))
        chain = self._linearise(
            torch.stack(path).mT.contiguous(), torch.stack(velocity).mT.contiguous(), self.ts
        )
        mean = (mv(chain.to_end[0], x.mT) + chain.end_shift[0]).mT
        factor = cholesky(chain.end_noise[0]).movedim(-1, 0)
        constant = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * x.shape[1] * math.log(2 * math.pi)
        size, parts = max(1, _CHUNK_NUMBERS // y.numel()), []
        for own, lower, shift in zip(mean.split(size), factor.split(size), constant.split(size), strict=True):
            white = torch.linalg.solve_triangular(lower, (y - own[:, None]).mT, upper=False)
            parts.append(-0.5 * white.square().sum(-2) - shift[:, None])
        return torch.cat(parts)

    @torch.no_grad()
    def _correction(self, chain: Chain, x: Tensor, y: Tensor) -> Tensor:
        # the same noise for every parameter, so that the density stays a smooth function of them
        generator = torch.Generator(x.device).manual_seed(0)
        ends = x.contiguous(), y.contiguous()
        return log_correction(weighted_paths(self.family, chain, *ends, self.corrections, generator)[2])

    def _linearise(self, nominal: Tensor, velocity: Tensor, grid: Tensor) -> Chain:
        r"""Linearise about the path with states and velocities ``(K+1, d, P)``, to fourth order in the spacing.

        Midpoints are those of cubic Hermite interpolation, integrals follow Simpson's rule, and fundamental matrices
        Magnus' expansion :math:`\exp\big(\tfrac h6(J_0+4J_m+J_1)+\tfrac{h^2}{12}[J_1,J_0]\big)`.
        """
        h = grid.diff().to(nominal)
        h1, h2 = h[:, None, None], h[:, None, None, None]
        move = nominal[1:] - nominal[:-1]
        middle = 0.5 * (nominal[1:] + nominal[:-1]) + h1 / 8 * (velocity[:-1] - velocity[1:])
        speed = 1.5 * move / h1 - 0.25 * (velocity[1:] + velocity[:-1])
        t = grid.to(nominal)
        b, j = self._evaluate(t, nominal)
        b_mid, j_mid = self._evaluate(0.5 * (t[1:] + t[:-1]), middle)
        j0, j1 = j[:-1], j[1:]
        self.stiffness = float((j0.abs().sum(-2).amax((1, 2)) * h).max())
        whole = _exp(h2 / 6 * (j0 + 4 * j_mid + j1) + h2.square() / 12 * (mm(j1, j0) - mm(j0, j1)))
        half = _exp(h2 / 24 * (8 * j_mid + 5 * j1 - j0))
        # what the drift moves beyond the nominal path, carried to the end of the step
        gap = b - velocity
        excess = h1 / 6 * (mv(whole, gap[:-1]) + 4 * mv(half, b_mid - speed) + gap[1:])
        shift = nominal[1:] + excess - mv(whole, nominal[:-1])
        spread = self.spread[..., None]
        noise = h2 / 6 * (_conjugate(whole, spread) + 4 * _conjugate(half, spread) + spread)
        matrix = whole
        to_end, end_shift, end_noise = _to_end(matrix, shift, noise)
        level = b - mv(j, nominal)
        return Chain(grid, matrix, shift, noise, to_end, end_shift, end_noise, j, level, self.spread)

    def _evaluate(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return drift ``(K, d, P)`` and Jacobian ``(K, d, d, P)`` at times ``t (K,)``."""
        drift, jacobian = self.family.linearise(t[:, None, None], x.movedim(-2, -1))
        return drift.movedim(-1, -2).contiguous(), jacobian.movedim(-3, -1).contiguous()


def _exp(a: Tensor) -> Tensor:
    """Return the exponential of small matrices, to fourth order."""
    square = mm(a, a)
    eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)[..., None]
    return eye + a + mm(square, 0.5 * eye + a / 6 + square / 24)


def _conjugate(a: Tensor, spread: Tensor) -> Tensor:
    return mm(mm(a, spread), mt(a))


def _to_end(matrix: Tensor, shift: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrix, shift and covariance of the end given each state, by the backward recursion."""
    # backward from the end: Psi_k = Psi_{k+1} A_k, D_k = D_{k+1} + Psi_{k+1} c_k, R_k = R_{k+1} + Psi_{k+1} Q_k Psi_{k+1}^T
    psi = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)[..., None].expand_as(matrix[0])
    d, r = torch.zeros_like(shift[0]), torch.zeros_like(noise[0])
    maps, shifts, covariances = [psi], [d], [r]
    for k in reversed(range(matrix.shape[0])):
        r = r + mm(mm(psi, noise[k]), mt(psi))
        d = d + mv(psi, shift[k])
        psi = mm(psi, matrix[k])
        maps.append(psi)
        shifts.append(d)
        covariances.append(r)
    return torch.stack(maps[::-1]), torch.stack(shifts[::-1]), torch.stack(covariances[::-1])


def transition(
    family: DriftFamily, spread: Tensor, start: float, end: float, dt: float, corrections: int = 0
) -> Transition:
    """Return the exact process where the drift is affine, else the linearised one."""
    if family.affine() is not None:
        return AffineTransition(family, spread, start, end, dt)
    return LinearisedTransition(family, spread, start, end, dt, corrections=corrections)
