"""Gaussian snapshots: the exact refinement of a linear reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_positive_int
from stochdyn.bridges.laws.gaussian_chain import GaussianChainBridge
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import InvalidInputError

__all__ = ["GaussianRefinement", "refine_gaussian"]


@dataclass(frozen=True)
class GaussianRefinement:
    """What :func:`refine_gaussian` found.

    Attributes:
        drift_matrix: The matrices of the drift after each iteration, ``(K + 1, d, d)``, the start first.
        drift_offset: The offsets of the drift after each iteration, ``(K + 1, d)``, the start first.
        kl: The divergence of each iteration's bridge from the reference that it was built on; it never increases.
        bridge: The bridge on the last reference but one.
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
    max_iterations: int = 10,
    drift_matrix: Tensor | None = None,
    drift_offset: Tensor | None = None,
    *,
    num_nodes: int = 32,
) -> GaussianRefinement:
    r"""Refine a linear reference on Gaussian snapshots, with both steps exact.

    .. math::
        Q^k=\arg\min_{Q:\,Q_{t_i}=N(m_i,S_i)}\mathrm{KL}(Q\,\|\,R_{k-1}),\qquad
        (A_k,b_k)=\arg\min_{A,b}\int E_{Q^k}\big|b_{Q^k}(t,X_t)-AX_t-b\big|^2dt .

    The first step is :class:`GaussianChainBridge`; the second is least squares, whose moments are integrals of smooth functions
    of time, taken by Gauss's rule. It is the oracle for :func:`~stochdyn.bridges.refinement.refinement.refine`, and an
    estimator of its own where snapshots are known by their first two moments.

    Args:
        times: The times of the snapshots, ``(I,)``.
        means: The means of the snapshots, ``(I, d)``.
        covs: The covariances of the snapshots, ``(I, d, d)``, positive definite.
        diffusion: The noise of the reference, of full rank.
        max_iterations: The number of iterations, ``K``.
        drift_matrix: The matrix to start from, ``(d, d)``; None for zero.
        drift_offset: The offset to start from, ``(d,)``; None for zero.
        num_nodes: The number of nodes of the quadrature in each interval.

    Raises:
        InvalidInputError: If the snapshots don't determine the drift.

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
    check_positive_int(max_iterations, "max_iterations")
    check_positive_int(num_nodes, "num_nodes", 2)
    means = as_tensor(means, "means", 2, "(I, d)")
    dim, like = means.shape[-1], means
    matrix = like.new_zeros(dim, dim) if drift_matrix is None else drift_matrix
    offset = like.new_zeros(dim) if drift_offset is None else drift_offset
    points, weights = (torch.as_tensor(v).to(like) for v in np.polynomial.legendre.leggauss(num_nodes))
    matrices, offsets, kls = [matrix], [offset], []
    for _ in range(max_iterations):
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
        # least squares of the bridge's drift on (x, 1): (A, b) E[z z^T] = E[u z^T]
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
