"""Importance sampling of a posterior in moderately many dimensions, around its mode and along its own skewness."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from stochdyn.core.particles.resampling import effective_size, systematic
from stochdyn.diagnostics.psis import pareto_smooth

__all__ = ["Weighted", "draw_posterior"]

#: Draws of weights with a worse k-hat are improved: by a second round of weights, then by Metropolis steps, so many of them.
_BAD, _MOVES = 0.7, 8
#: Degrees of freedom of the proposal, and of that of the second round, whose covariance needs no safety.
_TAILS, _TAILS_AGAIN = 7, 15
#: How far along each parameter the density is read, in standard deviations, and how finely.
_REACH, _SPACING = 6.0, 0.5

Density = Callable[[Tensor], Tensor]


class Weighted(NamedTuple):
    """Draws of a posterior and what is known of their quality.

    Attributes:
        draws: Draws of equal weight, ``(n, p)``.
        khat: The Pareto k of the importance weights behind them.
        effective: The effective number of weighted draws.
        log_evidence: The log of the mean weight.
        moved: Whether the draws were moved by Metropolis steps because the weights were bad.
    """

    draws: Tensor
    khat: float
    effective: float
    log_evidence: float
    moved: bool


class _Round(NamedTuple):
    theta: Tensor
    value: Tensor
    log_weights: Tensor
    khat: float


def draw_posterior(
    density: Density, mode: Tensor, curvature: Tensor, num_draws: int, source: torch.Generator
) -> Weighted:
    r"""Draw from a posterior by importance weights, resampled.

    The first proposal is a Student-t in coordinates in which the density along each parameter is Gaussian: the signed root
    :math:`\pm\sqrt{2(\ell(\hat\theta)-\ell(\theta))}` of the log density on the line of conditional means. Log rates with few
    jumps behind them are skewed, and this removes their skewness. Where k-hat is above 0.7, resampled draws are moved by
    Metropolis steps, which leave the exact posterior unchanged, and a second round proposes with their mean and
    covariance in the same coordinates; where that doesn't help, the moved draws are the answer.

    Args:
        density: The log density of parameters ``(n, p)``, up to a constant, ``(n,)``.
        mode: Its maximum, ``(p,)``.
        curvature: Minus its Hessian there, ``(p, p)``.
        num_draws: The number of draws.
        source: The source of randomness.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024.
    """
    shape = _SignedRoot(density, mode, curvature)
    best = shape.round(num_draws, source)
    if best.khat > _BAD:
        second = shape.refitted(_resampled(density, best, num_draws, source)).round(num_draws, source)
        best = second if second.khat < best.khat else best
    weights = (best.log_weights - best.log_weights.logsumexp(0)).exp()
    moved = best.khat > _BAD
    if moved:
        draws = _resampled(density, best, num_draws, source)
    else:
        draws = best.theta[torch.multinomial(weights, num_draws, replacement=True, generator=source)]
    evidence = float(best.log_weights.logsumexp(0)) - math.log(len(weights))
    return Weighted(draws, best.khat, float(effective_size(best.log_weights)), evidence, moved)


class _SignedRoot:
    """A Student-t in the signed roots of the density along each parameter."""

    def __init__(self, density: Density, mode: Tensor, curvature: Tensor) -> None:
        self.density, self.mode = density, mode
        values, vectors = torch.linalg.eigh(curvature)
        # directions in which the posterior is nearly flat are no wider than those of the weakest prior allowed
        cov = (vectors / values.clamp(min=1e-6 * float(values.max()))) @ vectors.mT
        self.scale = cov.diagonal().sqrt()
        self.root = torch.linalg.cholesky(cov / self.scale[:, None] / self.scale)
        self.centre, self.tails = torch.zeros_like(mode), _TAILS
        num = int(_REACH / _SPACING)
        steps = torch.arange(-num, num + 1, dtype=torch.float64) * _SPACING
        # along E[theta | theta_j], one standard deviation of theta_j per unit
        lines = mode + steps[:, None, None] * (cov / self.scale[:, None])
        with torch.no_grad():
            heights = density(lines.reshape(-1, len(mode))).reshape(len(steps), -1)
            drop = (heights[num] - heights).clamp(min=0.0)
        signed = (steps.sign()[:, None] * (2 * drop).sqrt()).numpy()
        # the root must grow: at least by a tenth of what it does at the mode, where its slope is one
        for k in range(num + 1, len(steps)):
            signed[k] = np.maximum(signed[k], signed[k - 1] + 0.1 * _SPACING)
            signed[-1 - k] = np.minimum(signed[-1 - k], signed[len(steps) - k] - 0.1 * _SPACING)
        signed = np.where(np.isfinite(signed), signed, np.sign(steps.numpy())[:, None] * 1e3)
        self.ends, self.knots, self.steps = torch.as_tensor(signed[[0, -1]]), signed, steps.numpy()
        self.maps = [PchipInterpolator(signed[:, j], steps.numpy()) for j in range(len(mode))]
        self.slopes = [m.derivative() for m in self.maps]

    def refitted(self, theta: Tensor) -> _SignedRoot:
        """Return the same with the mean and covariance that draws ``(n, p)`` of the posterior have in these coordinates."""
        move = ((theta - self.mode) / self.scale).numpy().T
        z = np.stack([np.interp(m, self.steps, self.knots[:, j]) for j, m in enumerate(move)])
        other = copy.copy(self)
        other.centre, other.tails = torch.as_tensor(z.mean(1)), _TAILS_AGAIN
        cov = torch.as_tensor(np.atleast_2d(np.cov(z)))
        other.root = torch.linalg.cholesky(cov + 1e-6 * torch.diag(cov.diagonal()))
        return other

    def round(self, num_draws: int, source: torch.Generator) -> _Round:
        """Draw, and weigh the draws."""
        t, log_t = _student(num_draws, len(self.mode), source, self.tails)
        z = self.centre + t @ self.root.mT
        inside = z.clamp(self.ends[0], self.ends[1])
        columns = inside.numpy().T
        slope = torch.as_tensor(np.stack([f(c) for f, c in zip(self.slopes, columns, strict=True)], -1))
        slope = slope.clamp(min=1e-12)
        move = torch.as_tensor(np.stack([f(c) for f, c in zip(self.maps, columns, strict=True)], -1))
        theta = self.mode + self.scale * (move + slope * (z - inside))
        with torch.no_grad():
            value = self.density(theta)
        log_proposal = log_t - (slope * self.scale).log().sum(-1) - self.root.diagonal().log().sum()
        return _weigh(theta, value, log_proposal)


def _student(n: int, p: int, source: torch.Generator, tails: int) -> tuple[Tensor, Tensor]:
    """Return draws ``(n, p)`` of a multivariate Student-t and their log densities."""
    normal = torch.randn(n, p, dtype=torch.float64, generator=source)
    # a chi-square law as a sum of squares of normals, which takes a source of randomness
    chi = torch.randn(n, tails, dtype=torch.float64, generator=source).square().sum(-1, keepdim=True)
    t = normal / (chi / tails).sqrt()
    return t, _log_student(t.square().sum(-1), p, tails)


def _log_student(square: Tensor, p: int, tails: int) -> Tensor:
    constant = math.lgamma((tails + p) / 2) - math.lgamma(tails / 2) - 0.5 * p * math.log(tails * math.pi)
    return constant - 0.5 * (tails + p) * torch.log1p(square / tails)


def _weigh(theta: Tensor, value: Tensor, log_proposal: Tensor) -> _Round:
    smoothed = pareto_smooth(torch.where(torch.isfinite(value), value - log_proposal, -math.inf))
    return _Round(theta, value, smoothed.log_weights, float(smoothed.khat))


def _resampled(density: Density, known: _Round, num_draws: int, source: torch.Generator) -> Tensor:
    """Return draws of equal weight, moved by Metropolis steps in the metric of their weighted covariance."""
    weights = (known.log_weights - known.log_weights.logsumexp(0)).exp()
    chosen = systematic(known.log_weights, num_draws, source)
    chosen = chosen[torch.randperm(num_draws, generator=source)]
    theta, value = known.theta[chosen], known.value[chosen]
    gap = known.theta - weights @ known.theta
    cov = (weights[:, None] * gap).mT @ gap
    root = torch.linalg.cholesky(cov + 1e-9 * torch.diag(cov.diagonal()))
    scale = 2.38 / math.sqrt(theta.shape[1])
    for _ in range(_MOVES):
        proposed = theta + scale * torch.randn(theta.shape, dtype=torch.float64, generator=source) @ root.mT
        with torch.no_grad():
            other = density(proposed)
        accept = torch.rand(len(theta), dtype=torch.float64, generator=source).log() < other - value
        theta, value = torch.where(accept[:, None], proposed, theta), torch.where(accept, other, value)
    return theta
