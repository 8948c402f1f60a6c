r"""The Bayesian linear model in feature space: evidence, posterior of the weights, all from one Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gram", "WeightPosterior", "accumulate", "log_evidence", "weight_posterior"]


@dataclass(frozen=True)
class Gram:
    r"""Sufficient statistics of rows :math:`y=\Phi w+\varepsilon,\ \varepsilon_i\sim N(0,\tau^2r_i)`.

    Attributes:
        gram: :math:`\Phi^\top R^{-1}\Phi`, ``(k, k)``.
        cross: :math:`\Phi^\top R^{-1}y`, ``(k, B)`` for B fields.
        square: :math:`\sum_by_b^\top R^{-1}y_b`.
        log_relative: :math:`\sum_i\log r_i`.
        rows: The number of rows.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    log_relative: Tensor
    rows: int

    @property
    def fields(self) -> int:
        """Number of fields B that share the design."""
        return self.cross.shape[1]


def accumulate(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Gram:
    """Sum the statistics over parts of the data: features ``(N, k)``, values ``(N, B)``, relative variances ``(N,)``."""
    total: list[Tensor] = []
    rows = 0
    for phi, y, relative in parts:
        scaled = phi / relative[:, None]
        terms = (scaled.mT @ phi, scaled.mT @ y, (y**2 / relative[:, None]).sum(), relative.log().sum())
        total = [a.add_(b) for a, b in zip(total, terms, strict=True)] if total else list(terms)
        rows += phi.shape[0]
    return Gram(total[0], total[1], total[2], total[3], rows)


def _capacitance(stats: Gram, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the root of s, the Cholesky factor of I + s^½ G s^½ / noise, and L⁻¹ s^½ b."""
    # A = I + S^½ G S^½ / τ² = L L' and L⁻¹ S^½ b (Woodbury: k × k, whatever the number of rows).
    root = s.clamp(min=0).sqrt()
    inner = root[:, None] * stats.gram * root / noise
    inner = inner + torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device)
    factor = torch.linalg.cholesky(inner)
    half = torch.linalg.solve_triangular(factor, root[:, None] * stats.cross, upper=False)
    return root, factor, half


def log_evidence(stats: Gram, s: Tensor, noise: Tensor) -> Tensor:
    r"""Return the log density of all values, the weights integrated out.

    .. math::
        \log p(y)=-\tfrac12\Big[\frac{y^\top R^{-1}y}{\tau^2}-\frac{|L^{-1}S^{1/2}b|^2}{\tau^4}
        +N\log2\pi\tau^2+\log|R|+2\sum_l\log L_{ll}\Big],\quad LL^\top=I+\frac{S^{1/2}GS^{1/2}}{\tau^2}

    summed over fields. Costs k³, whatever the number of rows.

    Args:
        stats: The sufficient statistics of the data.
        s: The prior variances of the weights, ``(k,)``.
        noise: The noise variance τ².
    """
    _, factor, half = _capacitance(stats, s, noise)
    misfit = (stats.square - (half**2).sum() / noise) / noise
    volume = stats.rows * torch.log(2.0 * math.pi * noise) + stats.log_relative
    return -0.5 * (misfit + stats.fields * (volume + 2.0 * factor.diagonal().log().sum()))


@dataclass(frozen=True)
class WeightPosterior:
    """Gaussian law of the weights: means ``(k, B)``, and a root ``(k, k)`` of the covariance that all fields share."""

    mean: Tensor
    root: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, k, B)``."""
        shape = (n, self.root.shape[1], self.mean.shape[1])
        normal = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.root @ normal


def weight_posterior(stats: Gram, s: Tensor, noise: Tensor) -> WeightPosterior:
    r"""Return the law of the weights given the values: mean :math:`S^{1/2}A^{-1}S^{1/2}b/\tau^2`, covariance :math:`S^{1/2}A^{-1}S^{1/2}`."""
    # Mean S^½ A⁻¹ S^½ b / τ², and S^½ L⁻ᵀ, a root of the covariance S^½ A⁻¹ S^½.
    root, factor, half = _capacitance(stats, s, noise)
    mean = root[:, None] * torch.linalg.solve_triangular(factor.mT, half, upper=True) / noise
    eye = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    return WeightPosterior(mean, root[:, None] * torch.linalg.solve_triangular(factor.mT, eye, upper=True))
