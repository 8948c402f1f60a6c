"""Importance sampling of a posterior in moderately many dimensions, around its mode and along its own skewness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from stochdyn.diagnostics.psis import pareto_smooth

__all__ = ["Weighted", "draw_posterior"]

#: Draws of weights with a worse k-hat are improved: by a second round of weights, then by Metropolis steps, so many of them.
_BAD, _MOVES = 0.7, 8
#: Degrees of freedom of the proposal.
_TAILS = 7.0
#: How far along each parameter the density is read, in standard deviations, and how finely.
_REACH, _SPACING = 6.0, 0.5
#: Kernels of the second round.
_KERNELS = 400

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
    jumps behind them are skewed, and this removes their skewness. Where k-hat is above 0.7 a second round proposes from
    kernels around the draws of the first; where that doesn't help, resampled draws are moved by Metropolis steps, which leave
    the exact posterior unchanged.

    Args:
        density: The log density of parameters ``(n, p)``, up to a constant, ``(n,)``.
        mode: Its maximum, ``(p,)``.
        curvature: Minus its Hessian there, ``(p, p)``.
        num_draws: The number of draws.
        source: The source of randomness.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024; for the second round West,
        "Approximating posterior distributions by mixtures", 1993.
    """
    best = _SignedRoot(density, mode, curvature).round(num_draws, source)
    if best.khat > _BAD:
        second = _kernel_round(density, best, num_draws, source)
        best = second if second.khat < best.khat else best
    weights = (best.log_weights - best.log_weights.logsumexp(0)).exp()
    chosen = torch.multinomial(weights, num_draws, replacement=True, generator=source)
    draws, moved = best.theta[chosen], best.khat > _BAD
    if moved:
        draws = _walk(density, draws, best.value[chosen], weights, best.theta, source)
    evidence = float(best.log_weights.logsumexp(0)) - math.log(len(weights))
    return Weighted(draws, best.khat, float(1.0 / weights.square().sum()), evidence, moved)


class _SignedRoot:
    """A Student-t in the signed roots of the density along each parameter."""

    def __init__(self, density: Density, mode: Tensor, curvature: Tensor) -> None:
        self.density, self.mode = density, mode
        values, vectors = torch.linalg.eigh(curvature)
        # directions in which the posterior is nearly flat are no wider than those of the weakest prior allowed
        cov = (vectors / values.clamp(min=1e-6 * float(values.max()))) @ vectors.mT
        self.scale = cov.diagonal().sqrt()
        self.root = torch.linalg.cholesky(cov / self.scale[:, None] / self.scale)
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
        self.ends = torch.as_tensor(signed[[0, -1]])
        self.maps = [PchipInterpolator(signed[:, j], steps.numpy()) for j in range(len(mode))]
        self.slopes = [m.derivative() for m in self.maps]

    def round(self, num_draws: int, source: torch.Generator) -> _Round:
        """Draw, and weigh the draws."""
        t, log_t = _student(num_draws, len(self.mode), source)
        z = t @ self.root.mT
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


def _student(n: int, p: int, source: torch.Generator, tails: float = _TAILS) -> tuple[Tensor, Tensor]:
    """Return draws ``(n, p)`` of a multivariate Student-t and their log densities."""
    normal = torch.randn(n, p, dtype=torch.float64, generator=source)
    # a chi-square law as a sum of squares of normals, which takes a source of randomness
    chi = torch.randn(n, int(tails), dtype=torch.float64, generator=source).square().sum(-1, keepdim=True)
    t = normal / (chi / tails).sqrt()
    return t, _log_student(t.square().sum(-1), p, tails)


def _log_student(square: Tensor, p: int, tails: float) -> Tensor:
    constant = math.lgamma((tails + p) / 2) - math.lgamma(tails / 2) - 0.5 * p * math.log(tails * math.pi)
    return constant - 0.5 * (tails + p) * torch.log1p(square / tails)


def _weigh(theta: Tensor, value: Tensor, log_proposal: Tensor) -> _Round:
    smoothed = pareto_smooth(torch.where(torch.isfinite(value), value - log_proposal, -math.inf))
    return _Round(theta, value, smoothed.log_weights, float(smoothed.khat))


def _weighted_cov(theta: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = weights @ theta
    gap = theta - mean
    return mean, (weights[:, None] * gap).mT @ gap


def _kernel_round(density: Density, first: _Round, num_draws: int, source: torch.Generator) -> _Round:
    """Propose from Student kernels around resampled draws, shrunk towards their mean so that the mixture keeps their covariance."""
    p = first.theta.shape[1]
    weights = (first.log_weights - first.log_weights.logsumexp(0)).exp()
    mean, cov = _weighted_cov(first.theta, weights)
    root = torch.linalg.cholesky(cov + 1e-10 * torch.diag(cov.diagonal()))
    # Silverman's bandwidth for the effective number of draws
    effective = float(1.0 / weights.square().sum())
    width = min(1.0, (4.0 / ((p + 2.0) * effective)) ** (1.0 / (p + 4.0)))
    chosen = torch.multinomial(weights, _KERNELS, replacement=True, generator=source)
    centres = mean + math.sqrt(max(0.0, 1 - width**2)) * (first.theta[chosen] - mean)
    which = torch.randint(_KERNELS, (num_draws,), generator=source)
    t, _ = _student(num_draws, p, source)
    theta = centres[which] + width * t @ root.mT
    with torch.no_grad():
        value = density(theta)
    a = torch.linalg.solve_triangular(root, theta.mT, upper=False).mT
    b = torch.linalg.solve_triangular(root, centres.mT, upper=False).mT
    square = torch.cdist(a, b).square() / width**2
    log_proposal = (
        _log_student(square, p, _TAILS).logsumexp(-1)
        - math.log(_KERNELS)
        - root.diagonal().log().sum()
        - p * math.log(width)
    )
    return _weigh(theta, value, log_proposal)


def _walk(
    density: Density, theta: Tensor, value: Tensor, weights: Tensor, all_draws: Tensor, source: torch.Generator
) -> Tensor:
    """Move draws by Metropolis steps in the metric of their weighted covariance."""
    _, cov = _weighted_cov(all_draws, weights)
    root = torch.linalg.cholesky(cov + 1e-10 * torch.diag(cov.diagonal()))
    scale = 2.38 / math.sqrt(theta.shape[1])
    for _ in range(_MOVES):
        proposed = theta + scale * torch.randn(theta.shape, dtype=torch.float64, generator=source) @ root.mT
        with torch.no_grad():
            other = density(proposed)
        accept = torch.rand(len(theta), dtype=torch.float64, generator=source).log() < other - value
        theta, value = torch.where(accept[:, None], proposed, theta), torch.where(accept, other, value)
    return theta
