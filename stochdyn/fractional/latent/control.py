"""Simulated posteriors of a latent SDE: the control of the paper, and the tight one with a variance for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn.core.gaussian.affine import by_channel, by_column
from stochdyn.core.law.path import PathSample
from stochdyn.core.networks import MLP
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.methods import Method
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.fractional.latent.base import Bound, Draws, EncodedPosterior
from stochdyn.fractional.latent.networks import ContextHead
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.latent.series_encoder import Contexts

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["ControlPosterior"]

_Coefficients = tuple[Tensor, Tensor | None, Tensor | None]
_AtStep = Callable[[int], _Coefficients]


class _Recorder(Control):
    """A control of all increments of a step that notes its draws and what they add to the divergence."""

    def __init__(
        self,
        network: MLP,
        coefficients: _AtStep,
        scale: Tensor,
        width: Tensor,
        count: int,
        span: float,
    ) -> None:
        super().__init__()
        self.network, self.width, self.count, self.span = network, width, count, span
        self.coefficients, self.scale = coefficients, scale.unbind(0)
        self.rows: dict[int, tuple[Tensor, Tensor, Tensor]] | None = {}

    def shape_increment(
        self, n: int, t: Tensor, dt: Tensor | float, z: Tensor, e: Tensor, channels: int
    ) -> Tensor:
        """Return increments of the posterior from increments ``e`` of the prior; see :meth:`Control.shape_increment`."""
        (context, feedback, factor), scale = self.coefficients(n), self.scale[n]
        scaled = z / self.width
        mean = self.network(torch.cat([scaled, context.expand(*z.shape[:-1], context.shape[-1])], -1))
        if feedback is not None:
            mean = mean + _respond(feedback, scaled, channels)
        mean = mean * (dt / self.span) ** 0.5
        standard = e / scale
        # In units of the prior the increment is N(m, L L'), and KL = (|m|^2 + tr L L' - M) / 2 - log det L. The ratio
        # log p - log q is that of the same two densities at the increment drawn; without L it is Girsanov's -u dW - u^2 dt / 2.
        divergence = 0.5 * mean.square().sum(-1)
        if factor is None:
            if self.count < e.shape[-1]:
                mean = torch.nn.functional.pad(mean, (0, e.shape[-1] - self.count))
            drawn = mean + standard
            ratio = -(mean * (0.5 * mean + standard)).sum(-1)
        else:
            drawn = mean + _spread(factor, standard, channels)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
            divergence = divergence + 0.5 * (factor.square().sum((-3, -2, -1)) - e.shape[-1]) - log_det
            ratio = 0.5 * (standard.square() - drawn.square()).sum(-1) + log_det
        if self.rows is not None:
            self.rows[n] = (drawn, divergence, ratio)
        return drawn * scale

    def record(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardised increments ``(N, S, B, M)``, and divergence and log ratio ``(S, B)`` of all steps.

        Segments that are computed again for a gradient note nothing.
        """
        rows, self.rows = self.rows or {}, None
        drawn, divergence, ratio = zip(*(rows[n] for n in range(len(rows))), strict=True)
        return torch.stack(drawn), torch.stack(divergence).sum(0), torch.stack(ratio).sum(0)


class ControlPosterior(EncodedPosterior):
    r"""A posterior that is simulated under a control network :math:`u(t,z,\mathrm{context})`.

    Without ``tight`` it is that of the paper: the Brownian increments get the drift u and keep their
    variance. With it, all innovations of a step get a mean, and those of each channel a covariance
    :math:`LL^\top` from the context, whose diagonal is :math:`(1+\alpha\Delta)^{-1/2}` before correlation. Then the bound
    doesn't pay for the time step. Besides the network there is linear feedback on each component's own states, with gains
    from the context: where the model is linear and its components independent, the exact posterior is of this form. Time is counted
    in lengths of the grid.

    Args:
        model: The model, whose equation and grid give the sizes.
        hidden: The widths of the hidden layers of the control network.
        tight: Whether all innovations get means and covariances, as above.
        context: The size of the encoder's summary.
        num_particles: The number of paths per series in each estimate of the bound.
        method: The scheme by which paths are simulated.
    """

    def __init__(
        self,
        model: LatentSDE,
        hidden: Sequence[int],
        tight: bool,
        context: int,
        num_particles: int,
        method: Method,
    ) -> None:
        super().__init__(model, context, num_particles, method)
        channels, noise = model.dim, model.sde.noise
        innovations, states = noise.num_innovations(model.ts), 1 + noise.num_states
        self.channels, self.innovations, self.tight = channels, innovations, tight
        count = channels * innovations if tight else channels
        self.count = count
        seen = self.encoder.width
        self.network = MLP((channels * states + seen, *hidden, count), zero_last=True)
        self.head: nn.Linear | None = None
        if tight:
            self.head = nn.Linear(seen, channels * innovations * (innovations + 1) // 2)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            self.response = ContextHead(seen, count * (1 + states))

    def _by_step(self, contexts: Contexts, dt: Tensor) -> _AtStep:
        """Return context, feedback and factor as a function of the step: of all steps at once, or one by one to save memory."""
        if self.method.checkpoint:

            def one(n: int) -> _Coefficients:
                row = contexts.at(n + 1)
                if not self.tight:
                    return row, None, None
                return row, self._feedback(row[None])[0], self._factor(row[None], dt[n : n + 1])[0]

            return one
        context = contexts.all()[1:]
        rows = context.unbind(0)
        if not self.tight:
            return lambda n: (rows[n], None, None)
        feedback, factor = self._feedback(context).unbind(0), self._factor(context, dt).unbind(0)
        return lambda n: (rows[n], feedback[n], factor[n])

    def _feedback(self, context: Tensor) -> Tensor:
        """Return offsets and gains ``(N, B, m, R, 1 + 1 + K)`` of innovations on the state and memory of their component."""
        return self.response(context).unflatten(-1, (self.channels, self.innovations, -1))

    def _factor(self, context: Tensor, dt: Tensor) -> Tensor:
        """Return lower triangular factors ``(N, B, m, R, R)``."""
        assert self.head is not None
        r = self.innovations
        raw = self.head(context).unflatten(-1, (self.channels, -1))
        lag = dt.reshape(-1, 1, 1, 1)
        # The variance 1 / (1 + alpha dt) vanishes into that of the prior as dt -> 0, so that the continuous limit stays
        # absolutely continuous; alpha is small at the start of training, where the posterior is close to the prior.
        alpha = torch.exp(3.0 * raw[..., :r] - 3.0)
        diagonal = torch.rsqrt(1 + alpha * lag)
        factor = torch.diag_embed(diagonal)
        if r > 1:
            rows, columns = torch.tril_indices(r, r, -1)
            below = torch.zeros_like(factor)
            below[..., rows, columns] = raw[..., r:] * lag.sqrt()
            factor = factor + below
        return factor

    def _simulate(self, model: LatentSDE, series: Series, n: int) -> tuple[PathSample, Tensor, Tensor]:
        """Return paths ``(n, B)``, divergences and log ratios of the increments, ``(n, B)`` each."""
        sde, ts = model.sde, model.ts
        contexts = self.encoder.lookup(model.units.standardised(series), ts)
        start = self.start(model, contexts.at(0), n)
        scale = model.increment_scale()
        control = _Recorder(
            self.network,
            self._by_step(contexts, ((ts[1:] - ts[:-1]) / model.span).to(contexts.summaries.dtype)),
            scale,
            model.width,
            self.count,
            model.span,
        )
        noise, _ = draw_increments(sde, start.x0, ts)
        run = integrate(
            sde.with_control(control),
            start.x0,
            ts,
            noise,
            start.memory,
            method=self.method,
        )
        drawn, divergence, ratio = control.record()
        e = (drawn * scale[:, None, None, :]).movedim(0, -2)
        aux = {} if run.memory is None else {"memory": run.memory.movedim(0, -3)}
        if e.shape[-1] > self.channels:
            aux["residual"] = e[..., self.channels :]
        path = PathSample(ts, run.x.movedim(0, -2), e[..., : self.channels], aux)
        return path, divergence + start.divergence, ratio + start.log_ratio

    def bound(self, model: LatentSDE, series: Series) -> Bound:
        """Return the parts of the bound from simulated paths; see :meth:`LatentPosterior.bound`."""
        path, divergence, ratio = self._simulate(model, series, self.num_particles)
        return Bound(model.log_likelihood(path.x, series), divergence, ratio.detach())

    def draw(self, model: LatentSDE, series: Series, num_draws: int) -> Draws:
        """Return simulated paths with their weights; see :meth:`LatentPosterior.draw`."""
        path, _, ratio = self._simulate(model, series, num_draws)
        return Draws(path, ratio, model.log_likelihood(path.x, series))


def _respond(feedback: Tensor, z: Tensor, channels: int) -> Tensor:
    """Return the means ``(..., m R)`` that linear feedback ``(..., m, R, 2 + K)`` on scaled states ``z (..., m + m K)`` gives."""
    states = by_channel(z, channels).unsqueeze(-1)
    return by_column(feedback[..., 0] + (feedback[..., 1:] @ states).squeeze(-1))


def _spread(factor: Tensor, standard: Tensor, channels: int) -> Tensor:
    """Multiply normals ``(..., m R)`` by block factors ``(..., m, R, R)``."""
    if factor.shape[-1] == 1:
        return factor[..., 0, 0] * standard
    first, rest = standard[..., :channels, None], standard[..., channels:].unflatten(-1, (channels, -1))
    blocks = torch.cat([first, rest], -1).unsqueeze(-1)
    return by_column((factor @ blocks).squeeze(-1))
