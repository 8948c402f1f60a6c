"""The evidence lower bound of a Gaussian posterior: no simulated path, all times at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.core.gaussian.feedback import FeedbackLaw
from stochdyn.core.law.path import PathSample
from stochdyn.fractional.latent.gaussian_posterior import GaussianPosterior
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.objectives.elbo import GaussianObservations, PathLikelihood

__all__ = ["GaussianELBO", "expected_log_likelihood"]


class GaussianELBO(Objective):
    r"""Minus the evidence lower bound of a latent path whose posterior is a :class:`GaussianPosterior`.

    .. math:: \mathrm{ELBO}=E_Q\log p(y\mid x)-\mathrm{KL}(Q\,\|\,P)

    With an affine drift and :class:`~stochdyn.GaussianObservations` both terms are in closed form: the value and its
    gradient have no noise. Otherwise what isn't closed is averaged over draws of whole paths, which take no
    loop over time.

    Args:
        posterior: The posterior Q, with its prior.
        likelihood: The function from paths (and the batch) to log-likelihoods, one for each path.
        num_particles: The draws for what isn't in closed form.

    Example:
        >>> from stochdyn import SDE, DiffusionMeasure
        >>> from stochdyn.fractional import AffineDrift, MarkovNoise
        >>> noise = MarkovNoise(0.7, 5, horizon=1.0, dt=0.05)
        >>> prior = DiffusionMeasure(torch.zeros(1), SDE(AffineDrift(-torch.eye(1)), 1.0, noise))
        >>> ts = torch.linspace(0, 1, 21)
        >>> data = GaussianObservations(ts, ts[-1:], torch.tensor([0.5]), 0.1)
        >>> objective = GaussianELBO(GaussianPosterior(prior, ts), data)
        >>> objective(None).bound
        'evidence_lower'
    """

    def __init__(
        self,
        posterior: GaussianPosterior,
        likelihood: PathLikelihood | Callable[[PathSample, Any], Tensor],
        num_particles: int = 8,
    ) -> None:
        super().__init__()
        check_positive_int(num_particles, "num_particles")
        self.posterior = posterior
        self.likelihood = likelihood
        self.num_particles = num_particles

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate the bound."""
        posterior = self.posterior
        known = posterior.prepare()
        law = posterior.law(known)
        closed = type(self.likelihood) is GaussianObservations
        draws = None if closed and posterior.exact else law.draw(self.num_particles)
        if posterior.exact or draws is None:
            divergence = law.divergence()
        else:
            divergence = posterior.estimate_divergence(law, known.noise, draws)
        if closed or draws is None:
            fit = expected_log_likelihood(law, cast(GaussianObservations, self.likelihood), posterior.dim)
        else:
            x = draws.z[..., : posterior.dim, :].movedim(-1, 0).movedim(1, -2)
            fit = self.likelihood(PathSample(posterior.ts, x, x[..., 1:, :0]), batch).mean(0)
        elbo = (fit - divergence).sum()
        terms = {"elbo": elbo.detach(), "log_likelihood": fit.detach().sum(), "kl": divergence.detach().sum()}
        return ObjectiveValue(-elbo, terms, "evidence_lower")

    @torch.no_grad()
    def evidence(self, num_samples: int = 1000, batch: Any = None) -> tuple[Tensor, Tensor]:
        """Return the importance-sampling estimate of the log evidence ``(*B)`` and log weights ``(n, *B)``."""
        path, log_ratio = self.posterior.sample(num_samples)
        log_weight = self.likelihood(path, batch) + log_ratio
        return torch.logsumexp(log_weight, 0) - math.log(num_samples), log_weight


def expected_log_likelihood(law: FeedbackLaw, data: GaussianObservations, dim: int) -> Tensor:
    """Return the mean under a Gaussian law of the log-likelihood of Gaussian observations, ``(*B)``."""
    # E log N(y; x, s^2) = log N(y; E x, s^2) - Var(x) / 2 s^2, with x linear between its neighbours on the grid, whose covariance enters.
    mean, cov = law.moments
    right, weight = data.right, data.weight
    left = right - 1
    variance = cov.diagonal(dim1=-2, dim2=-1)[..., :dim]
    across = (law.transition[left][..., :dim, :] * cov[left][..., :dim, :]).sum(-1)
    lead = (1,) * (mean.ndim - 2)
    w = weight.reshape(-1, *lead, 1)
    center = torch.lerp(mean[left][..., :dim], mean[right][..., :dim], w)
    spread = (1 - w) ** 2 * variance[left] + w**2 * variance[right] + 2 * w * (1 - w) * across
    scale = data.scale
    values = data.values.reshape(-1, *lead, dim)
    if scale.ndim == 2:
        scale = scale.reshape(scale.shape[0], *lead, scale.shape[1])
    fit = torch.distributions.Normal(center, scale, validate_args=False).log_prob(values)
    fit = fit - 0.5 * spread / scale**2
    return torch.where(data.seen.reshape(values.shape), fit, torch.zeros_like(fit)).sum(-1).sum(0)
