"""A posterior without an encoder: the exact one of the model linearised around each series' most probable path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._transforms import as_leaf, recording
from stochdyn.core.gaussian.feedback import log_diagonal
from stochdyn.core.law.path import PathSample
from stochdyn.core.law.transition import time_column
from stochdyn.core.sde.solvers import full_state, integrate
from stochdyn.fractional.latent.base import Bound, Draws, LatentPosterior
from stochdyn.fractional.latent.series import Series
from stochdyn.infer.distributions import PathIncrements
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import Quadratic, linear_posterior, second_order
from stochdyn.infer.mode import linear_feedback
from stochdyn.infer.start import StartPosterior
from stochdyn.infer.view import SiteView, view_site

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["LinearisedPosterior"]


class LinearisedPosterior(LatentPosterior):
    r"""The posterior of the model linearised around the most probable path, computed for every series and never trained.

    The increments of each step follow :math:`\epsilon_n\mid z_n\sim N(k_n+K_nz_n,L_nL_n^\top)`, where z is the path with the memory of its
    noise, and k, K and L are those of the backward information filter. Paths are then simulated by the true equation, so that
    their weights are exact. Of a linear-Gaussian model it is the posterior itself, and the bound is the evidence without any noise, if
    observations fall on points of the grid; between two points their precision is shared out between both.

    Gradients pass through the filter, so that those of a linear-Gaussian model have no noise either, but for that of the start; the path
    around which the model is linearised is taken as given.

    Args:
        max_iterations: The number of linearisations, each around the mean path of the last wherever that is more probable.
        num_particles: The number of paths per series in each estimate of the bound.
    """

    def __init__(self, max_iterations: int, num_particles: int) -> None:
        super().__init__(num_particles)
        self.max_iterations = max_iterations

    def _law(self, model: LatentSDE, series: Series) -> tuple[Feedback, StartPosterior]:
        """Return the law of the increments and that of the start."""
        view = _view(model, len(series))
        with torch.no_grad():
            z, e = self._around(view, model, series)
        keep = torch.is_grad_enabled()
        return _posterior(view, z, e, _expanded(model, series, z[..., : view.dim], keep), keep)

    def _around(self, view: SiteView, model: LatentSDE, series: Series) -> tuple[Tensor, Tensor]:
        """Return the states ``(T, B, Z)`` and increments ``(N, B, M)`` around which the model is linearised."""
        assert view.start is not None
        start, e = view.start.mean, view.zero_increments()
        z = view.run(e, start)
        if self.max_iterations == 1:
            return z, e
        data = _expanded(model, series, z[..., : view.dim], False)
        score = _log_density(view, data, e, start)
        for left in range(self.max_iterations - 2, -1, -1):
            feedback, begin = _posterior(view, z, e, data, False)
            trial_e, trial_z = view.follow(feedback, begin.loc)
            trial = _expanded(model, series, trial_z[..., : view.dim], False)
            trial_score = _log_density(view, trial, trial_e, begin.loc)
            # a series whose path would be less probable stays where it is; nothing here waits for the device
            better = trial_score >= score
            at = better.unsqueeze(-1)
            e, z = torch.where(at, trial_e, e), torch.where(at, trial_z, z)
            if left:
                score = torch.where(better, trial_score, score)
                data = Quadratic(
                    torch.where(at.unsqueeze(-1), trial.precision, data.precision),
                    torch.where(at, trial.linear, data.linear),
                )
        return z, e

    def _simulate(self, model: LatentSDE, series: Series, n: int) -> tuple[PathSample, Tensor]:
        """Return paths ``(n, B)`` of the equation under the feedback, and their log density ratios ``(n, B)``."""
        feedback, start = self._law(model, series)
        prior_mean, prior_scale = model.start_prior()
        value = start.draw(torch.Size((n,)), torch.Size((len(series),)))
        prior = torch.distributions.Normal(prior_mean, prior_scale, validate_args=False)
        ratio = prior.log_prob(value).sum(-1) - start.law.log_prob(value)
        x0, memory = model.split_start(value)
        scale, ts = feedback.scale, model.ts
        normal = torch.randn(scale.shape[0], n, len(series), scale.shape[-1]).to(value)
        run = integrate(
            model.sde.with_control(feedback),
            x0,
            ts,
            normal * scale[:, None, None],
            memory,
            method=self.method,
        )
        z = full_state(run.x, run.memory)[:-1]
        factor = feedback.law.factor.unsqueeze(1)
        drawn = feedback.mean(time_column(ts[:-1], z), z) + (factor @ normal.unsqueeze(-1)).squeeze(-1)
        # log p - log q of the increments, in units of the prior: p is standard normal, q is N(mean, L L')
        increments = 0.5 * (normal.square() - drawn.square()).sum(-1).sum(0)
        ratio = ratio + increments + log_diagonal(feedback.law.factor).sum(0)
        dw = (drawn * scale[:, None, None]).movedim(0, -2)
        aux = {} if run.memory is None else {"memory": run.memory.movedim(0, -3)}
        if dw.shape[-1] > model.dim:
            aux["residual"] = dw[..., model.dim :]
        return PathSample(ts, run.x.movedim(0, -2), dw[..., : model.dim], aux), ratio

    def bound(self, model: LatentSDE, series: Series) -> Bound:
        """Return the parts of the bound from simulated paths; see :meth:`LatentPosterior.bound`."""
        path, ratio = self._simulate(model, series, self.num_particles)
        return Bound(model.log_likelihood(path.x, series), -ratio, ratio.detach())

    def draw(self, model: LatentSDE, series: Series, num_draws: int) -> Draws:
        """Return simulated paths with their weights; see :meth:`LatentPosterior.draw`."""
        path, ratio = self._simulate(model, series, num_draws)
        return Draws(path, ratio, model.log_likelihood(path.x, series))


def _expanded(model: LatentSDE, series: Series, x: Tensor, keep_graph: bool) -> Quadratic:
    """Return the log-likelihood as a quadratic around the paths ``x (T, B, d)``."""
    with recording():
        leaf = as_leaf(x)
        value = model.log_likelihood(leaf.movedim(0, -2).unsqueeze(0), series)[0]
        return second_order(value.sum() + 0.0 * leaf.sum(), leaf, value.detach(), keep_graph)


def _posterior(
    view: SiteView, z: Tensor, e: Tensor, data: Quadratic, keep_graph: bool
) -> tuple[Feedback, StartPosterior]:
    """Return the posterior of the model linearised around states and increments."""
    assert view.start is not None
    found = linear_posterior(view.linear_steps(z, e, keep_graph), data)
    mean, factor = view.start.posterior(found.start_precision, found.start_linear)
    return linear_feedback(view, found, z), StartPosterior(mean.to(z), factor.to(z))


def _view(model: LatentSDE, count: int) -> SiteView:
    """Return the latent path of ``count`` series as a path site, with a random start and the past of its noise."""
    law = torch.distributions.Independent(
        torch.distributions.Normal(model.start_mean, model.start_log_scale.exp(), validate_args=False), 1
    )
    site = PathIncrements(model.sde, model.start_mean.expand(count, -1), model.ts).expand((count,))
    factor = model.sde.noise.initial_factor(dtype=model.start_mean.dtype, device=model.ts.device)
    return view_site(site, "x", law, factor is not None)


def _log_density(view: SiteView, data: Quadratic, e: Tensor, start: Tensor) -> Tensor:
    """Return the log density ``(B,)`` of data, increments and start, up to a constant."""
    assert view.start is not None and data.value is not None
    gap = (start - view.start.mean).unsqueeze(-1)
    prior = (e / view.units(e.ndim)).square().sum(-1).sum(0) + (gap.mT @ view.start.precision @ gap)[
        ..., 0, 0
    ]
    return data.value - 0.5 * prior
