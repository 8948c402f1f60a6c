"""What every posterior of a latent SDE offers: a bound to train, and weighted draws of paths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.methods import Euler, Method
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.latent.series_encoder import SeriesEncoder

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["Bound", "Draws", "EncodedPosterior", "LatentPosterior", "Start"]


@dataclass(frozen=True)
class Bound:
    """The parts of the evidence lower bound, each ``(S, B)`` or ``(B,)``.

    Attributes:
        log_likelihood: The log density of the observations given the paths.
        divergence: What to differentiate and subtract; its mean is the divergence from the prior.
        log_ratio: The log density ratio log p - log q of the paths, if there are any: the true weights without the likelihood.
    """

    log_likelihood: Tensor
    divergence: Tensor
    log_ratio: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Posterior paths with their weights.

    Attributes:
        path: The paths, of shape ``(S, B)``, with the memory of the noise.
        log_ratio: The log density ratios log p - log q ``(S, B)`` of the paths.
        log_likelihood: The log densities ``(S, B)`` of the observations given the paths.
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
    """A family of posteriors of latent paths given series.

    Args:
        num_particles: The number of draws per series in each estimate of the bound.
        method: The scheme by which paths of the equation are simulated, in the posterior and in forecasts after it.
    """

    def __init__(self, num_particles: int, method: Method | None = None) -> None:
        super().__init__()
        self.num_particles = num_particles
        self.method = Euler() if method is None else method

    @abstractmethod
    def bound(self, model: LatentSDE, series: Series) -> Bound:
        """Return the parts of the bound, from ``num_particles`` draws where draws are needed.

        Args:
            model: The model that the posterior belongs to.
            series: The data of a batch.
        """

    @abstractmethod
    def draw(self, model: LatentSDE, series: Series, num_draws: int) -> Draws:
        """Return posterior paths of each series with their weights.

        Args:
            model: The model that the posterior belongs to.
            series: The data of a batch.
            num_draws: The number of paths per series.
        """


class EncodedPosterior(LatentPosterior):
    """A posterior whose start and steps are read off the summaries of an encoder.

    Args:
        model: The model, whose equation, grid and start give the sizes.
        context: The size of the encoder's summary.
        num_particles: The number of draws per series in each estimate of the bound.
        method: The scheme by which paths of the equation are simulated.
    """

    def __init__(
        self, model: LatentSDE, context: int, num_particles: int, method: Method | None = None
    ) -> None:
        super().__init__(num_particles, method)
        self.encoder = SeriesEncoder(
            model.obs_dim, context, float(model.ts[-1] - model.ts[0]), float(model.ts[0])
        )
        self.start_head = nn.Linear(self.encoder.width, 2 * model.start_size)
        nn.init.zeros_(self.start_head.weight)
        nn.init.zeros_(self.start_head.bias)

    def start(self, model: LatentSDE, context: Tensor, num_draws: int) -> Start:
        """Draw the start, state and past of the noise: normal, with parameters from the context.

        Args:
            model: The model that the posterior belongs to.
            context: The context ``(B, C)`` at the start of the grid.
            num_draws: The number of draws per series.
        """
        mean, log_scale = self.start_head(context).chunk(2, -1)
        prior_mean, prior_scale = model.start_prior()
        scale = prior_scale * log_scale.exp()
        center = prior_mean + prior_scale * mean
        normal = torch.randn(num_draws, *center.shape, dtype=center.dtype, device=center.device)
        value = center + scale * normal
        # In units of the prior, KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s.
        divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale
        standard = mean + log_scale.exp() * normal
        # log p - log q on the draw: both are normal densities of the same point, in units of the prior.
        ratio = 0.5 * (normal.square() - standard.square()) + log_scale
        x0, memory = model.split_start(value)
        return Start(x0, memory, divergence.sum(-1), ratio.sum(-1))
