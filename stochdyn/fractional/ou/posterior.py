"""Posterior of a fractional Ornstein-Uhlenbeck path: marginals, joint covariance, samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.errors import ShapeError

__all__ = ["FractionalOUPosterior", "Problem", "joint_covariance"]


@dataclass(frozen=True)
class FractionalOUPosterior:
    """The law of a fractional Ornstein-Uhlenbeck path given observations, at the times ``ts``.

    Attributes:
        ts: ``(T,)``.
        mean, variance: ``(*B, T)``.
        log_evidence: ``(*B)`` log density of the observations.
        problem: the chain and the data behind it.
        index: ``(T,)`` where ``ts`` lies on the chain's grid.
    """

    ts: Tensor
    mean: Tensor
    variance: Tensor
    log_evidence: Tensor
    problem: Problem
    index: Tensor

    def covariance(self) -> Tensor:
        """Return the joint posterior covariance, ``(*B, T, T)``."""
        p = self.problem
        prior = p.joint_covariance()
        observed = p.mask.nonzero()[:, 0] if p.mask.ndim == 1 else None
        if observed is None:
            raise ShapeError("covariance() needs one mask for all series", got=f"mask {tuple(p.mask.shape)}")
        noise = p.obs_variance[observed].movedim(0, -1)
        seen = prior[..., observed, :][..., :, observed] + torch.diag_embed(noise)
        factor = torch.linalg.cholesky(seen)
        white = torch.linalg.solve_triangular(factor, prior[..., observed, :][..., self.index], upper=False)
        here = prior[..., self.index, :][..., :, self.index]
        return (here - white.mT @ white).to(self.mean.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` posterior paths, ``(n, *B, T)``, reparametrised."""
        check_positive_int(n, "n")
        p = self.problem
        z = p.chain.sample_posterior(n, p.y, p.emission, p.obs_variance[..., None, None], p.mask, generator)
        path = z[..., 0].movedim(1, -1)[..., self.index] + p.mean[..., None]
        return path.to(self.mean.dtype)


@dataclass(frozen=True)
class Problem:
    """A chain on a grid with the observations laid out on it; time leads."""

    chain: GaussianChain
    mean: Tensor
    y: Tensor  # (N+1, *B, 1), less the mean
    mask: Tensor  # (N+1,) or (N+1, *B)
    obs_variance: Tensor  # (N+1,) or (N+1, *B)
    emission: Tensor  # (1, K+1)

    def joint_covariance(self) -> Tensor:
        """Covariance of X at all grid points, ``(*B, N+1, N+1)``."""
        return joint_covariance(self.chain)


def joint_covariance(chain: GaussianChain) -> Tensor:
    """Covariance of the first state over time: columns Cov(z_n, x_m) are carried forward together."""
    _, covs = chain.moments()
    rows = []
    columns = covs[0][..., :, :1]
    for n in range(covs.shape[0]):
        if n > 0:
            columns = torch.cat([chain.transition[n - 1] @ columns, covs[n][..., :, :1]], dim=-1)
        rows.append(torch.nn.functional.pad(columns[..., 0, :], (0, covs.shape[0] - 1 - n)))
    lower = torch.stack(rows, dim=-2)
    return lower + lower.tril(-1).mT
