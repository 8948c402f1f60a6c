"""What every posterior of a latent SDE offers: a bound to train, and weighted draws of paths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn.core.law.path import PathSample
from stochdyn.fractional.latent.series import Series

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["Bound", "Draws", "LatentPosterior", "Start"]


@dataclass(frozen=True)
class Bound:
    """The parts of the evidence lower bound, each ``(S, B)`` or ``(B,)``.

    Attributes:
        log_likelihood: of the observations given paths.
        divergence: what to differentiate and subtract; its mean is the divergence from the prior.
        log_ratio: log p - log q of the paths, if there are any: the true weights without the likelihood.
    """

    log_likelihood: Tensor
    divergence: Tensor
    log_ratio: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Posterior paths with their weights.

    Attributes:
        path: of shape ``(S, B)``, with the memory of the noise.
        log_ratio: ``(S, B)`` log p - log q of the paths.
        log_likelihood: ``(S, B)`` of the observations given the paths.
    """

    path: PathSample
    log_ratio: Tensor
    log_likelihood: Tensor

    @property
    def log_weight(self) -> Tensor:
        """``(S, B)`` log importance weights: log p(y, x) - log q(x | y)."""
        return self.log_ratio + self.log_likelihood


@dataclass(frozen=True)
class Start:
    """A drawn start: ``x0 (S, B, d)``, memory ``(S, B, m, K)`` or None, divergence and log ratio ``(S, B)``."""

    x0: Tensor
    memory: Tensor | None
    divergence: Tensor
    log_ratio: Tensor


class LatentPosterior(nn.Module, ABC):
    """A family of posteriors of latent paths given series."""

    @abstractmethod
    def bound(self, model: LatentSDE, series: Series, n: int) -> Bound:
        """Return the parts of the bound, from ``n`` draws where draws are needed."""

    @abstractmethod
    def draw(self, model: LatentSDE, series: Series, n: int) -> Draws:
        """Return ``n`` posterior paths per series."""

    def start(self, model: LatentSDE, context: Tensor, n: int) -> Start:
        """Draw the start: the state and the past of the noise, normal with parameters from the context ``(B, C)``."""
        mean, log_scale = model.start_head(context).chunk(2, -1)
        prior_mean, prior_scale = model.start_prior()
        scale = prior_scale * log_scale.exp()
        center = prior_mean + prior_scale * mean
        normal = torch.randn(n, *center.shape, dtype=center.dtype, device=center.device)
        value = center + scale * normal
        # in units of the prior: N(mean, exp(log_scale)^2) against N(0, 1)
        divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale
        standard = mean + log_scale.exp() * normal
        ratio = 0.5 * (normal.square() - standard.square()) + log_scale
        x0, memory = model.split_start(value)
        return Start(x0, memory, divergence.sum(-1), ratio.sum(-1))
