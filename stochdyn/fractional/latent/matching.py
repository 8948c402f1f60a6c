"""A posterior given by its marginals, for Brownian noise: trained without any simulated path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn.core.law.path import PathSample
from stochdyn.core.law.transition import time_column
from stochdyn.core.networks import MLP
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.methods import Method
from stochdyn.core.sde.reversal import spatial_divergence
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.fractional.latent.base import Bound, Draws, LatentPosterior
from stochdyn.fractional.latent.series import Series
from stochdyn.objectives.matching import matching_rate

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["MatchingPosterior"]


class MatchingPosterior(LatentPosterior):
    r"""Gaussian marginals :math:`N(m(t),s(t)^2)` read off the series; the diffusion that has them is the posterior.

    .. math::
        \mathrm{ELBO}=\sum_iE\log p(y_i\mid x_{t_i})-T\,E_{t\sim U}\,E\,\tfrac12|\sigma^{-1}(f-b)|^2
        -\mathrm{KL}(q_0\,\|\,p_0),

    with the drift f of :func:`stochdyn.objectives.matching.marginal_drift`. Every observation counts in full. The
    divergence is estimated at a few random times per series, so the cost of a step doesn't depend on the length of the grid.

    Args:
        model: The model, whose equation and grid give the sizes.
        hidden: The widths of the hidden layers of the network of the marginals.
        context: The size of the recurrent summaries, one in each direction of time.
        num_times: The number of random times per series in each estimate of the bound.
        method: The scheme by which paths are simulated.

    Reference:
        G. Bartosh, D. Vetrov and C. A. Naesseth, SDE matching, ICML 2025.
    """

    def __init__(
        self,
        model: LatentSDE,
        hidden: Sequence[int],
        context: int,
        num_times: int,
        method: Method | None = None,
    ) -> None:
        super().__init__(num_times, method)
        self.dim, self.span = model.dim, float(model.ts[-1] - model.ts[0])
        self.start_time = float(model.ts[0])
        self.gru = nn.GRU(2 * model.obs_dim + 2, context, bidirectional=True)
        self.network = MLP((2 * context + 1, *hidden, 2 * self.dim))

    def marginal(self, series: Series) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the function from times ``(L, B, 1)`` to mean and standard deviation ``(L, B, d)``."""
        knots = (series.times - self.start_time).to(series.values)
        times = knots / self.span
        gap = torch.nn.functional.pad(times.diff(dim=1), (1, 0))
        seen = series.mask.to(series.values)
        features = torch.cat([series.values * seen, seen, gap.unsqueeze(-1), times.unsqueeze(-1)], -1)
        states = self.gru(features.movedim(1, 0))[0]  # (n, B, 2 width)
        last = knots.shape[1] - 1

        def at(t: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                point = (t.detach()[..., 0].T - self.start_time).contiguous()  # (B, L)
                right = torch.searchsorted(knots.contiguous(), point).clamp(min(1, last), last)
                left = (right - 1).clamp_min(0)
                begin, end = (knots.gather(1, i).T.unsqueeze(-1) for i in (left, right))
            begun = t - self.start_time
            weight = ((begun - begin) / (end - begin).clamp_min(1e-9 * self.span)).clamp(0.0, 1.0)
            low, high = (
                states.gather(0, i.T.unsqueeze(-1).expand(-1, -1, states.shape[-1])) for i in (left, right)
            )
            out = self.network(torch.cat([low + weight * (high - low), begun / self.span], -1))
            mean, raw = out.chunk(2, -1)
            return mean, 1e-3 + torch.nn.functional.softplus(raw)

        return at

    def bound(self, model: LatentSDE, series: Series) -> Bound:
        """Return the parts of the bound from random times of each series; see :meth:`LatentPosterior.bound`."""
        n, marginal = self.num_particles, self.marginal(model.units.standardised(series))
        begin, span = model.ts[0].to(series.values), self.span
        count = len(series)
        jitter = torch.rand(n, count, 1, dtype=series.values.dtype, device=series.values.device)
        strata = torch.arange(n, dtype=jitter.dtype, device=jitter.device).reshape(-1, 1, 1)
        t = begin + span * (strata + jitter) / n
        rate = matching_rate(model.sde, marginal, t, torch.randn(n, count, self.dim).to(t))
        mean, scale = marginal(series.times.T.unsqueeze(-1).to(t))
        x = mean + scale * torch.randn_like(mean, memory_format=torch.contiguous_format)
        fit = model.decoder.log_prob(x.unsqueeze(1), series).sum(0)
        return Bound(fit, span * rate.mean(0) + self._start_divergence(model, marginal, begin, count))

    def _start_divergence(
        self, model: LatentSDE, marginal: Callable[[Tensor], tuple[Tensor, Tensor]], begin: Tensor, count: int
    ) -> Tensor:
        (mean, scale), (prior_mean, prior_scale) = (
            self._start_law(marginal, begin, count),
            model.start_prior(),
        )
        ratio = scale / prior_scale
        gap = (mean - prior_mean) / prior_scale
        return (0.5 * (ratio.square() + gap.square() - 1) - ratio.log()).sum(-1)

    @staticmethod
    def _start_law(
        marginal: Callable[[Tensor], tuple[Tensor, Tensor]], begin: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        mean, scale = marginal(begin.expand(1, count, 1))
        return mean[0], scale[0]

    def draw(self, model: LatentSDE, series: Series, num_draws: int) -> Draws:
        """Return simulated paths with their weights; see :meth:`LatentPosterior.draw`."""
        n, marginal, ts = num_draws, self.marginal(model.units.standardised(series)), model.ts
        count = len(series)
        t = ts.to(series.values).reshape(-1, 1, 1).repeat(1, count, 1)
        (mean, scale), slopes = torch.func.jvp(marginal, (t,), (torch.ones_like(t),))[:2]
        prior_mean, prior_scale = model.start_prior()
        normal = torch.randn(n, count, self.dim).to(mean)
        x0 = mean[0] + scale[0] * normal
        start = (
            0.5 * (normal.square() - ((x0 - prior_mean) / prior_scale).square())
            + (scale[0] / prior_scale).log()
        )
        control = _MarginalControl(model.sde, mean, scale, *slopes)
        dw, _ = draw_increments(model.sde, x0, ts)
        run = integrate(model.sde.with_control(control), x0, ts, dw, method=self.method)
        u = torch.stack(control.rows)
        lag = time_column(ts[1:] - ts[:-1], u)
        ratio = -(u * (0.5 * u * lag + dw)).sum(-1).sum(0)
        path = PathSample(ts, run.x.movedim(0, -2), (dw + u * lag).movedim(0, -2))
        return Draws(path, ratio + start.sum(-1), model.log_likelihood(path.x, series))


class _MarginalControl(Control):
    """The control that turns the prior into the diffusion of given marginals."""

    def __init__(
        self, sde: SDE, mean: Tensor, scale: Tensor, mean_slope: Tensor, scale_slope: Tensor
    ) -> None:
        super().__init__()
        self.sde = sde
        self.parts = [x.unbind(0) for x in (mean, scale, mean_slope, scale_slope)]
        self.rows: list[Tensor] = []

    def shape_increment(
        self, n: int, t: Tensor, dt: Tensor | float, z: Tensor, e: Tensor, channels: int
    ) -> Tensor:
        """Return the increment ``e`` with the drift of the control added; see :meth:`Control.shape_increment`."""
        mean, scale, mean_slope, scale_slope = (part[n] for part in self.parts)
        noise = (z - mean) / scale
        # The drift of the diffusion with marginals N(m, s^2): m' + s' (z - m) / s + g^2 score / 2 + (g^2)' / 2.
        g = self.sde.diffusion(t, z)
        drift = mean_slope + scale_slope * noise - 0.5 * g.apply(g.apply(noise / scale))
        if self.sde.state_dependent:
            drift = drift + 0.5 * spatial_divergence(self.sde, t, z)
        u = g.solve(drift - self.sde.drift(t, z))
        self.rows.append(u)
        return e + u * dt
