"""Gaussian snapshots: the exact bridge through all of them, and the exact refinement of a linear reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_event_size, check_positive_int, check_time_grid
from stochdyn.bridges.laws.gaussian import GaussianBridge
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

__all__ = ["GaussianChainBridge", "GaussianRefinement", "refine_gaussian"]


class GaussianChainBridge:
    r"""The law nearest to a linear reference whose marginals at several times are given Gaussians.

    The reference is Markov and snapshots are of its full state, so the bridge is Markov too: bridges of
    neighbouring snapshots, glued (:class:`~stochdyn.bridges.laws.gaussian.GaussianBridge`). The precision matrix of its
    values at the snapshots is block tridiagonal.

    Args:
        times: ``(I,)`` of the snapshots.
        means: ``(I, d)``.
        covs: ``(I, d, d)``.
        diffusion: of the reference, as in :class:`~stochdyn.bridges.laws.gaussian.GaussianBridge`.
        drift_matrix: ``(d, d)``; None for zero.
        drift_offset: ``(d,)``; None for zero.

    Raises:
        TimeGridError, ShapeError, InvalidInputError: on arguments that don't fit.

    Example:
        >>> times = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
        >>> law = GaussianChainBridge(times, torch.zeros(3, 1).double(), torch.ones(3, 1, 1).double(), 1.0)
        >>> law.covariance(1.0).item()
        1.0
    """

    def __init__(
        self,
        times: Tensor,
        means: Tensor | Sequence[Tensor],
        covs: Tensor | Sequence[Tensor],
        diffusion: Coefficient | Tensor | float,
        drift_matrix: Tensor | None = None,
        drift_offset: Tensor | None = None,
    ) -> None:
        check_time_grid(times, "times")
        if not len(means) == len(covs) == times.shape[0]:
            raise ShapeError(
                "there must be one mean and one covariance a time",
                got=f"{len(means)} and {len(covs)}",
                expected=times.shape[0],
            )
        self.times = times
        self.bridges = [
            GaussianBridge(
                means[i], covs[i], means[i + 1], covs[i + 1], diffusion,
                float(times[i + 1] - times[i]), drift_matrix, drift_offset,
            )
            for i in range(times.shape[0] - 1)
        ]  # fmt: skip
        self.dim = self.bridges[0].dim

    def _place(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Interval and time since its start of every ``t``; snapshots count to the interval before."""
        clock = torch.as_tensor(t, dtype=self.times.dtype, device=self.times.device)
        low, high = float(self.times[0]), float(self.times[-1])
        slack = 1e-6 * (high - low)
        if bool(((clock < low - slack) | (clock > high + slack)).any()):
            raise TimeGridError(
                "t must lie inside the snapshots", got=clock.tolist(), expected=f"[{low:g}, {high:g}]"
            )
        index = torch.searchsorted(self.times, clock.contiguous()).clamp(1, len(self.bridges)) - 1
        return index, clock - self.times[index]

    def _gather(self, t: Tensor | float, name: str, event: int) -> Tensor:
        index, elapsed = self._place(t)
        like = self.bridges[0].mean0
        out = like.new_empty(*index.shape, *(self.dim,) * event)
        for i in index.unique().tolist():
            here = index == i
            out[here] = getattr(self.bridges[i], name)(elapsed[here].to(like.dtype))
        return out

    def mean(self, t: Tensor | float) -> Tensor:
        """Return the means ``(*s, d)`` at times ``t (*s,)``."""
        return self._gather(t, "mean", 1)

    def covariance(self, t: Tensor | float) -> Tensor:
        """Return the covariances ``(*s, d, d)`` at times ``t (*s,)``."""
        return self._gather(t, "covariance", 2)

    def drift(self, t: float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at one time ``t``; at a snapshot that of the interval before it."""
        check_event_size(x, self.dim, "x")
        index, elapsed = self._place(t)
        return self.bridges[int(index)].drift(float(elapsed), x)

    def snapshot_covariance(self) -> Tensor:
        """Return the covariance ``(I d, I d)`` of the values at all snapshots."""
        steps = [b.cross_covariance.mT @ torch.linalg.pinv(b.cov0) for b in self.bridges]
        covs = [b.cov0 for b in self.bridges] + [self.bridges[-1].cov1]
        rows = []
        for i, cov in enumerate(covs):
            row, block = [cov], cov
            for step in steps[i:]:
                block = block @ step.mT
                row.append(block)
            rows.append(row)
        count = len(covs)
        blocks = [
            [rows[i][j - i] if j >= i else rows[j][i - j].mT for j in range(count)] for i in range(count)
        ]
        return torch.cat([torch.cat(row, -1) for row in blocks])

    def kl(self) -> Tensor:
        """Return the divergence from the reference that starts from the first snapshot, in nats."""
        return torch.stack([b.kl() for b in self.bridges]).sum()


@dataclass(frozen=True)
class GaussianRefinement:
    """What :func:`refine_gaussian` found.

    Attributes:
        drift_matrix: ``(outer + 1, d, d)``, the start first.
        drift_offset: ``(outer + 1, d)``.
        kl: ``(outer,)``, the divergence of each iteration's bridge from the reference that it was built on; it never
            increases.
        bridge: the bridge on the last reference but one.
    """

    drift_matrix: Tensor
    drift_offset: Tensor
    kl: Tensor
    bridge: GaussianChainBridge


def refine_gaussian(
    times: Tensor,
    means: Tensor,
    covs: Tensor,
    diffusion: Coefficient | Tensor | float,
    outer: int = 10,
    drift_matrix: Tensor | None = None,
    drift_offset: Tensor | None = None,
    *,
    nodes: int = 32,
) -> GaussianRefinement:
    r"""Refine a linear reference on Gaussian snapshots, with both steps exact.

    .. math::
        Q^k=\arg\min_{Q:\,Q_{t_i}=N(m_i,S_i)}\mathrm{KL}(Q\,\|\,R_{k-1}),\qquad
        (A_k,b_k)=\arg\min_{A,b}\int E_{Q^k}\big|b_{Q^k}(t,X_t)-AX_t-b\big|^2dt .

    The first step is :class:`GaussianChainBridge`; the second is least squares, whose moments are integrals of smooth functions
    of time, taken by Gauss's rule. It is the oracle for :func:`~stochdyn.bridges.refinement.refinement.refine`, and an
    estimator of its own where snapshots are known by their first two moments.

    Args:
        times: ``(I,)``.
        means: ``(I, d)``.
        covs: ``(I, d, d)``, positive definite.
        diffusion: of full rank.
        outer: iterations.
        drift_matrix: where to start, ``(d, d)``; None for zero.
        drift_offset: likewise, ``(d,)``.
        nodes: of the quadrature in each interval.

    Raises:
        InvalidInputError: if the snapshots don't determine the drift.

    Example:
        >>> times = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> means = 3 * torch.exp(-times)[:, None]
        >>> covs = 0.5 + 0.1 * torch.exp(-2 * times)[:, None, None]
        >>> found = refine_gaussian(times, means, covs, diffusion=1.0)
        >>> round(found.drift_matrix[-1].item(), 3)
        -1.0

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative
    reference refinement, AISTATS.
    """
    check_positive_int(outer, "outer")
    check_positive_int(nodes, "nodes", 2)
    dim, like = means.shape[-1], means
    matrix = like.new_zeros(dim, dim) if drift_matrix is None else drift_matrix
    offset = like.new_zeros(dim) if drift_offset is None else drift_offset
    points, weights = (torch.as_tensor(v).to(like) for v in np.polynomial.legendre.leggauss(nodes))
    matrices, offsets, kls = [matrix], [offset], []
    for _ in range(outer):
        bridge = GaussianChainBridge(times, means, covs, diffusion, matrix, offset)
        kls.append(bridge.kl())
        gram, cross = like.new_zeros(dim + 1, dim + 1), like.new_zeros(dim, dim + 1)
        for part in bridge.bridges:
            clock, share = 0.5 * part.horizon * (1 + points), 0.5 * part.horizon * weights
            second = _augmented(part.mean(clock), part.covariance(clock))
            slope, shift = part.affine_drift(clock)
            gram = gram + torch.einsum("n,nij->ij", share, second)
            drift = torch.cat((slope, shift.unsqueeze(-1)), -1)
            cross = cross + torch.einsum("n,nij,njk->ik", share, drift, second)
        scale = gram.diagonal().rsqrt()
        scaled = scale[:, None] * gram * scale
        smallest = float(torch.linalg.eigvalsh(scaled)[0])
        if not smallest > 100 * dim * torch.finfo(gram.dtype).eps:
            raise InvalidInputError(
                "the snapshots don't determine the drift",
                got=f"smallest relative eigenvalue {smallest:.3g}",
                hint="give snapshots that move or spread",
            )
        solved = torch.linalg.solve(scaled, scale[:, None] * cross.mT).mT * scale
        matrix, offset = solved[:, :dim], solved[:, dim]
        matrices.append(matrix)
        offsets.append(offset)
    return GaussianRefinement(torch.stack(matrices), torch.stack(offsets), torch.stack(kls), bridge)


def _augmented(mean: Tensor, cov: Tensor) -> Tensor:
    """Second moments ``(n, d+1, d+1)`` of the state with a one behind it."""
    one = torch.ones_like(mean[..., :1])
    z = torch.cat((mean, one), -1)
    second = z.unsqueeze(-1) * z.unsqueeze(-2)
    return second + torch.nn.functional.pad(cov, (0, 1, 0, 1))
