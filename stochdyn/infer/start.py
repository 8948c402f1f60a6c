"""The random start of a path: its state, the past of its noise, and their joint Gaussian posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from stochdyn.core.gaussian.feedback import LiftedStart, start_lift
from stochdyn.core.law.girsanov import explicit_stop
from stochdyn.core.law.initial import DistributionStart
from stochdyn.infer.distributions import start_of

__all__ = ["GaussianStart", "StartPosterior", "StartPrior", "StickingStart", "is_unconstrained"]


def is_unconstrained(law: Any) -> bool:
    """Return whether a distribution lives on all vectors, as a Gaussian posterior does."""
    support: Any = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


class GaussianStart(dist.MultivariateNormal):
    """The site of a random start."""


class StickingStart(GaussianStart):
    """The same, with the gradient of its own parameters stopped in the score."""

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Report the density, differentiate it along the draw alone."""
        zero: Any = 0
        return ScoreParts(self.log_prob(x), zero, explicit_stop(lambda inputs: self.log_prob(*inputs), (x,)))


class StartPosterior:
    """A Gaussian posterior of a random start.

    Args:
        loc: ``(*batch, D)``.
        scale_tril: ``(*batch, D, D)``.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc = loc
        self.scale_tril = scale_tril
        self.law = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)

    def draw(self, sample_shape: torch.Size, batch_shape: torch.Size) -> Tensor:
        """Return ``(*sample, *batch, D)``."""
        return self.law.expand(batch_shape).rsample(sample_shape)


@dataclass(frozen=True)
class StartPrior:
    """What is random at the start of a path, as one vector: the state, then the standard normals of the past.

    Attributes:
        mean: ``(*batch, D)``.
        precision: ``(*batch, D, D)``, that of a Gaussian with the prior's variances.
        fixed: ``(*batch, d)`` the state where it isn't random, else None.
        factor: ``(Q, K)`` from the normals of a channel to its memory states, or None without a past.
        channels: ``m``.
    """

    mean: Tensor
    precision: Tensor
    fixed: Tensor | None
    factor: Tensor | None
    channels: int

    @staticmethod
    def of(
        law: Any, x0: Tensor, factor: Tensor | None, channels: int, batch: torch.Size
    ) -> StartPrior | None:
        """Build the prior, or None if nothing is random.

        Args:
            law: The law of the state at the start; None if it is fixed at ``x0``.
            x0: ``(*batch, d)``.
            factor: ``(Q, K)`` from the normals of the past to memory states; None without a past.
            channels: ``m``.
            batch: The batch shape of the path.
        """
        means, precisions = [], []
        if law is not None:
            means.append(start_of(DistributionStart(law)))
            precisions.append(_precision(law, means[0]))
        if factor is not None:
            size = channels * factor.shape[0]
            means.append(x0.new_zeros(size))
            precisions.append(torch.eye(size, dtype=x0.dtype, device=x0.device))
        if not means:
            return None
        mean = torch.cat([m.detach().expand(*batch, m.shape[-1]) for m in means], -1)
        precision = mean.new_zeros(*batch, mean.shape[-1], mean.shape[-1])
        at = 0
        for block in precisions:
            end = at + block.shape[-1]
            precision[..., at:end, at:end] = block.detach()
            at = end
        return StartPrior(mean, precision, None if law is not None else x0.detach(), factor, channels)

    @property
    def state_dim(self) -> int:
        """How many of the ``D`` components are the state's."""
        past = 0 if self.factor is None else self.channels * self.factor.shape[0]
        return self.mean.shape[-1] - past

    def split(self, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the state ``(*batch, d)`` and the past's normals ``(*batch, m, Q)``; None if not random."""
        state = value[..., : self.state_dim] if self.fixed is None else None
        past = (
            None if self.factor is None else value[..., self.state_dim :].unflatten(-1, (self.channels, -1))
        )
        return state, past

    def states(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the state ``(*batch, d)`` and the memory ``(*batch, m, K)`` that a start implies."""
        state, past = self.split(value)
        x0 = self.fixed if state is None else state
        return x0, None if past is None or self.factor is None else past @ self.factor  # type: ignore[return-value]

    def posterior(self, precision: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Combine with the likelihood ``exp(-1/2 z S z + eta z)`` of the full state.

        Returns:
            Posterior mean ``(*batch, D)`` and the Cholesky factor of the covariance ``(*batch, D, D)``.
        """
        size = precision.shape[-1]
        origin = precision.new_zeros(*self.mean.shape[:-1], size)
        if self.fixed is not None:
            origin[..., : self.fixed.shape[-1]] = self.fixed.to(precision)
        lift = start_lift(precision, size, self.state_dim, self.factor, self.channels)
        prior = LiftedStart.of_prior(origin, lift, self.mean.to(precision), self.precision.to(precision))
        found = prior.given(precision, linear)
        return found.mean, found.factor


def _precision(law: Any, like: Tensor) -> Tensor:
    """Return the precision of a law by its second moments; one where it has none."""
    precision = getattr(law, "precision_matrix", None)
    if precision is not None:
        return precision
    try:
        variance = law.variance
    except NotImplementedError:
        variance = torch.full_like(like, torch.nan)
    good = torch.isfinite(variance) & (variance > 0)
    return torch.diag_embed(1.0 / torch.where(good, variance, torch.ones_like(variance)))
