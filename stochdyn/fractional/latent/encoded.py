"""A Gaussian posterior of latent paths that an encoder reads off the series: no loop over time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import affine_steps, by_column
from stochdyn.core.gaussian.feedback import (
    FeedbackDraws,
    FeedbackLaw,
    LiftedStart,
    LinearFeedback,
    start_lift,
)
from stochdyn.core.law.path import PathSample
from stochdyn.core.law.transition import time_column
from stochdyn.core.sde.coefficients import Scalar
from stochdyn.fractional.latent.base import Bound, Draws, EncodedPosterior
from stochdyn.fractional.latent.gaussian_relative import shift_by_channel
from stochdyn.fractional.latent.networks import ContextHead
from stochdyn.fractional.latent.series import Series

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["AmortisedGaussianPosterior"]


class AmortisedGaussianPosterior(EncodedPosterior):
    r"""Linear feedback on a linear equation, with coefficients from the context of each step.

    For each component i the increments follow :math:`\epsilon_n\mid z_n\sim N(k_n+K_n(z_n-Ez_n),L_nL_n^\top)` and drive
    :math:`dX_i=(\alpha_nX_i+a_n)dt+\sigma_i\,dZ_i`; k, K, L, alpha and a are read off the series. See
    :class:`~stochdyn.fractional.GaussianPosterior` for the mathematics. All components see all of the context, but
    given the series they are independent, which keeps heads and matrices small. Time is counted in lengths of the grid.

    Args:
        model: The model, whose equation and grid give the sizes.
        context: The size of the encoder's summary.
        num_particles: The number of paths per series in each estimate of the bound.
    """

    def __init__(self, model: LatentSDE, context: int, num_particles: int) -> None:
        super().__init__(model, context, num_particles)
        noise = model.sde.noise
        r, k = noise.num_innovations(model.ts), noise.num_states
        self.dim, self.innovations, self.states = model.dim, r, k
        self.sizes = [r, r * (1 + k), r, r * (r - 1) // 2, 1, 1]
        self.head = ContextHead(self.encoder.width, self.dim * sum(self.sizes))

    def _law(self, model: LatentSDE, context: Tensor) -> tuple[FeedbackLaw, Tensor, Tensor]:
        """Return the law of batch ``(B, d)`` with states of one component, and its drift: slopes and offsets ``(N, B, d)``."""
        d, r, k = self.dim, self.innovations, self.states
        dt = (model.ts[1:] - model.ts[:-1]).to(context.dtype)
        lag = (dt / model.span).reshape(-1, 1, 1, 1)
        raw = self.head(context[1:]).unflatten(-1, (d, sum(self.sizes)))
        offset, gain, log_alpha, below, slope, shift = raw.split(self.sizes, -1)
        slope, shift = slope / model.span, shift / model.span
        # Variances 1 / (1 + alpha dt) of the increments, in units of the prior, and correlations within a step of order sqrt(dt).
        factor = torch.diag_embed(torch.rsqrt(1 + torch.exp(3 * log_alpha - 3) * lag))
        if r > 1:
            rows, columns = torch.tril_indices(r, r, -1)
            lower = torch.zeros_like(factor)
            lower[..., rows, columns] = below * lag.sqrt()
            factor = factor + lower
        noise = replace(model.noise_steps(), per_channel=False)  # components are a batch here
        steps = affine_steps(noise, Scalar(model.strength()), dt, slope.unsqueeze(-1), shift)
        width = torch.cat([model.width[:d, None], model.width[d:].reshape(d, k)], -1)
        feedback = gain.unflatten(-1, (r, 1 + k)) * lag.sqrt().unsqueeze(-1) / width.unsqueeze(-2)
        answer = LinearFeedback(offset * lag.sqrt(), feedback, factor)
        return FeedbackLaw(steps, answer, self._start(model, context[0])), slope[..., 0], shift[..., 0]

    def _start(self, model: LatentSDE, context: Tensor) -> LiftedStart:
        d = self.dim
        mean, log_scale = self.start_head(context).chunk(2, -1)
        prior_mean, prior_scale = model.start_prior()

        def by_component(x: Tensor) -> Tensor:
            return (
                torch.cat([x[..., :d, None], x[..., d:].unflatten(-1, (d, -1))], -1)
                if x.shape[-1] > d
                else x[..., None]
            )

        factor = model.sde.noise.initial_factor(dtype=mean.dtype, device=mean.device)
        lift = start_lift(mean, 1 + self.states, 1, factor, 1)
        center = by_component(prior_mean)
        return LiftedStart(
            mean.new_zeros(1 + self.states),
            lift,
            by_component(prior_mean + prior_scale * mean),
            torch.diag_embed(by_component(prior_scale * log_scale.exp())),
            center,
            torch.diag_embed(by_component(prior_scale**-2)),
        )

    def _draw(
        self, model: LatentSDE, series: Series, n: int
    ) -> tuple[FeedbackLaw, FeedbackDraws, Tensor, Tensor]:
        """Return law, draws, and by what the innovations ``(N, B, d, R, S)`` and memories ``(N+1, B, d, K, S)`` of P differ."""
        law, slope, shift = self._law(model, self.encoder(model.units.standardised(series), model.ts))
        draws = law.draw(n)
        x = draws.z[:-1, ..., 0, :]  # (N, B, d, S)
        # The path solves the linear equation; the prior's own drift reaches the same path by increments that differ by
        # (linear - nonlinear drift) dt / sigma.
        linear = slope.unsqueeze(-1) * x + shift.unsqueeze(-1)
        points = x.movedim(-1, 1)
        t, lag = time_column(model.ts[:-1], points), time_column(model.ts[1:] - model.ts[:-1], points)
        gap = (linear.movedim(-1, 1) - model.sde.drift(t, points)) * lag / model.strength()
        return law, draws, *shift_by_channel(model.noise_steps(), gap.movedim(1, -1))

    def bound(self, model: LatentSDE, series: Series) -> Bound:
        """Return the parts of the bound, without a simulated path; see :meth:`LatentPosterior.bound`."""
        law, draws, extra, _ = self._draw(model, series, self.num_particles)
        pull = law.increments(draws)[1]
        # E|pull + extra|^2 / 2 - E|pull|^2 / 2: what the nonlinear drift adds to the closed form.
        correction = (extra * (pull + 0.5 * extra)).sum((-3, -2)).sum(0).mean(-1)
        fit = model.log_likelihood(_paths(draws.z[..., 0, :]), series)
        return Bound(fit, law.divergence().sum(-1) + correction)

    def draw(self, model: LatentSDE, series: Series, num_draws: int) -> Draws:
        """Return paths drawn for all times at once, with their weights; see :meth:`LatentPosterior.draw`."""
        law, draws, extra, memory = self._draw(model, series, num_draws)
        e = law.increments(draws)[0] + extra  # (N, B, d, R, S)
        # log p - log q of the increments: p is standard normal, q the law that drew ``draws.noise``.
        log_det = law.feedback.factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1)).sum(0)
        ratio = 0.5 * (draws.noise.square() - e.square()).sum((-3, -2)).sum(0) + log_det.unsqueeze(-1)
        ratio = ratio - law.start.log_ratio(draws.start_noise).sum(1)
        x = _paths(draws.z[..., 0, :])
        dw = by_column(e.movedim(-1, 0).movedim(1, -3)) * model.increment_scale()
        aux = {}
        if self.states:
            aux["memory"] = (draws.z[..., 1:, :] + memory).movedim(-1, 0).movedim(1, -3)
        if dw.shape[-1] > self.dim:
            aux["residual"] = dw[..., self.dim :]
        path = PathSample(model.ts, x, dw[..., : self.dim], aux)
        return Draws(path, ratio.movedim(-1, 0), model.log_likelihood(x, series))


def _paths(x: Tensor) -> Tensor:
    """Bring columns ``(T, B, d, S)`` into the shape ``(S, B, T, d)``."""
    return x.movedim(-1, 0).movedim(1, -2)
