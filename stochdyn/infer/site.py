"""One path site of a guide: what the model says about it, and the parameters of its posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from stochdyn.core.coefficients import Coefficient, Matrix
from stochdyn.core.sde import SDE
from stochdyn.core.solvers import full_state, increment_scale, integrate
from stochdyn.errors import InvalidInputError, NonFiniteError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements, start_of
from stochdyn.infer.encoders import ControlNetwork, LikelihoodEncoder
from stochdyn.infer.feedback import Feedback, Gains
from stochdyn.infer.linearise import LinearPosterior, Quadratic, backward_pass, linear_steps
from stochdyn.infer.start import StartPosterior, StartPrior, is_unconstrained

__all__ = ["LinearStart", "PathSite", "SiteView", "fit_linearised", "view_site"]


@dataclass(frozen=True)
class SiteView:
    """A path site as the model presents it on one run.

    Attributes:
        fn: the site's distribution.
        path_name: the site that holds the path itself.
        x0: ``(*batch, d)`` start, the prior mean where it is random.
        memory0: ``(*batch, m, K)`` initial memory, or None.
        scale: ``(N, M)`` prior standard deviations of the increments.
        start: what is random at the start and belongs to this site, or None.
    """

    fn: DiffusionPath | PathIncrements
    path_name: str
    x0: Tensor
    memory0: Tensor | None
    scale: Tensor
    start: StartPrior | None = None

    @property
    def dim(self) -> int:
        """``d``."""
        return self.x0.shape[-1]

    @property
    def state_size(self) -> int:
        """``Z``, components of the full state."""
        channels = self.scale.shape[-1] // self.fn.sde.noise.num_innovations(self.fn.ts)
        return self.dim + channels * self.fn.sde.noise.num_states

    def batch(self) -> torch.Size:
        """Return the batch shape of a path."""
        return torch.broadcast_shapes(self.fn.batch_shape, self.x0.shape[:-1])

    def run(self, e: Tensor, start: Tensor | None = None, feedback: Feedback | None = None) -> Tensor:
        """Return the full states ``(T, *batch, Z)`` along increments, from a start of its own if given."""
        x0, memory0 = (
            (self.x0, self.memory0) if start is None or self.start is None else self.start.states(start)
        )
        sde = self.fn.sde.with_control(feedback)
        run = integrate(sde, x0.expand(*self.batch(), self.dim), self.fn.ts, e, memory0)
        return full_state(run.x, run.memory)

    def zero_increments(self) -> Tensor:
        """Return increments that are all zero."""
        return self.x0.new_zeros(self.scale.shape[0], *self.batch(), self.scale.shape[-1])

    def reference(self) -> Tensor:
        """Return the path without noise, cut off from the graph."""
        with torch.no_grad():
            return self.run(self.zero_increments())

    def value(self) -> Tensor:
        """Return the path without noise (or its increments) in the layout of the site."""
        if isinstance(self.fn, PathIncrements):
            return self.zero_increments().movedim(0, -2)
        return self.reference()[..., : self.dim].movedim(0, -2)

    def follow(self, feedback: Feedback, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean increments ``(N, *batch, M)`` and the full states ``(T, *batch, Z)`` they drive."""
        z = self.run(self.zero_increments(), start, feedback)
        t = self.fn.ts[:-1].to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
        scale = self.scale.reshape(self.scale.shape[0], *(1,) * (z.ndim - 2), -1)
        return feedback.mean(t, z[:-1]) * scale, z


def view_site(
    fn: DiffusionPath | PathIncrements, path_name: str, start_law: Any = None, past: bool = False
) -> SiteView:
    """Gather what a guide needs from a site's distribution.

    Args:
        fn: the site's distribution.
        path_name: the site that holds the path.
        start_law: law of a random start that the guide treats with an increments site.
        past: whether it treats the past of the noise too.
    """
    if isinstance(fn, PathIncrements):
        x0, memory0, scale = fn.x0, fn.memory0, fn.scale
        channels = scale.shape[-1] // fn.sde.noise.num_innovations(fn.ts)
        factor = fn.sde.noise.initial_factor(dtype=x0.dtype, device=x0.device) if past else None
    else:
        fn = _square(fn)
        x0 = start_of(fn.initial) if not fn.initial.fixed else fn.initial.draw((), None)
        channels = fn.sde.noise_dim(fn.ts[0].to(x0.dtype), x0)
        scale, memory0, factor = increment_scale(fn.sde, fn.ts, channels, x0.dtype), None, None
        start_law = getattr(fn.initial, "distribution", None)
        if start_law is not None and not is_unconstrained(start_law):
            raise InvalidInputError(
                "a path in state space needs a start that may be any vector",
                got=f"support {start_law.support} at site {path_name!r}",
                hint="sample the path in noise space: noise_space=True, or NoiseReparam",
            )
    batch = torch.broadcast_shapes(fn.batch_shape, x0.shape[:-1])
    return SiteView(fn, path_name, x0, memory0, scale, StartPrior.of(start_law, x0, factor, channels, batch))


def _square(fn: DiffusionPath) -> DiffusionPath:
    """Return the same law with no more noise channels than components: a path tells no more apart."""

    def root(g: Coefficient) -> Coefficient:
        return Matrix(torch.linalg.cholesky(g.covariance(dim)))

    sde, dim = fn.sde, fn.event_shape[-1]
    probe = start_of(fn.initial)
    constant = sde.diffusion(fn.ts[0].to(probe.dtype), probe)
    if constant.noise_dim(dim) <= dim:
        return fn
    varying = sde.state_dependent
    diffusion = (lambda t, x: root(sde.diffusion(t, x))) if varying else root(constant)
    return DiffusionPath(SDE(sde.drift, diffusion), fn.initial, fn.ts, fn.method).expand(fn.batch_shape)


@dataclass(frozen=True)
class LinearStart:
    """A linearised posterior and the path that it was taken around.

    Attributes:
        posterior: gains in absolute coordinates.
        states: ``(T, *batch, Z)`` its mean path.
        increments: ``(N, *batch, M)`` that drive it.
        start_mean: ``(*batch, D)`` posterior mean of a random start, or None.
        start_factor: ``(*batch, D, D)`` the Cholesky factor of its covariance, or None.
    """

    posterior: LinearPosterior
    states: Tensor
    increments: Tensor
    start_mean: Tensor | None
    start_factor: Tensor | None

    def value(self, view: SiteView) -> Tensor:
        """Return the mean path (or its increments) in the layout of the site."""
        if isinstance(view.fn, PathIncrements):
            return self.increments.movedim(0, -2)
        return self.states[..., : view.dim].movedim(0, -2)


def fit_linearised(
    view: SiteView, quadratic: Callable[[Tensor], Quadratic], iterations: int = 8, tolerance: float = 1e-6
) -> LinearStart:
    """Iterate linearisation and smoothing to the most probable path: the iterated extended smoother.

    Args:
        view: the site.
        quadratic: expansion of the log-likelihood around a path ``(T, *batch, d)``.
        iterations: at most so many.
        tolerance: relative change of the path at which to stop.

    Reference:
        Bell, "The iterated Kalman smoother as a Gauss-Newton method", 1994.
    """
    e = view.zero_increments()
    with torch.no_grad():
        z = view.run(e)
    best: LinearStart | None = None
    for _ in range(iterations):
        data = quadratic(z[..., : view.dim])
        with torch.no_grad():
            a, b, c = linear_steps(view.fn.sde, view.fn.ts, z[:-1], e, view.scale)
            wide = Quadratic(data.precision.double(), data.linear.double())
            posterior = backward_pass(a.double(), b.double(), c.double(), wide)
            mean = factor = None
            if view.start is not None:
                mean, factor = view.start.posterior(posterior.start_precision, posterior.start_linear)
                mean, factor = mean.to(z.dtype), factor.to(z.dtype)
            e_new, z_new = view.follow(Feedback(_absolute(posterior, z), view.scale), mean)
        if not bool(torch.isfinite(z_new).all()):
            break
        change = float((z_new - z).abs().max() / (1e-12 + z_new.abs().max()))
        z, e = z_new, e_new
        best = LinearStart(posterior, z, e, mean, factor)
        if change < tolerance:
            break
    if best is None:
        raise NonFiniteError("the linearised model has no finite posterior", hint="use start='prior'")
    return best


def _absolute(posterior: LinearPosterior, like: Tensor) -> Gains:
    """Return the gains around zero with unit width, in the state's precision."""
    size = posterior.gain.shape[-1]
    return Gains(
        posterior.offset.to(like.dtype),
        posterior.gain.to(like.dtype),
        posterior.factor.to(like.dtype),
        like.new_zeros(like.shape[0] - 1, *(1,) * (like.ndim - 2), size),
        like.new_ones(size),
    )


class PathSite(PyroModule):
    """Parameters of the posterior of one path site: free for each step, or read off the data by an encoder.

    Args:
        view: the site.
        start: linearised posterior to start from; None starts at the prior.
        amortised: whether an encoder sets the feedback.
        hidden: widths of the control network; empty for none.
        context: size of the encoder's summary.
    """

    def __init__(
        self,
        view: SiteView,
        start: LinearStart | None,
        *,
        amortised: bool,
        hidden: Sequence[int],
        context: int,
    ) -> None:
        super().__init__()
        self.amortised = amortised
        self.random_start = view.start is not None
        steps, size, count = view.scale.shape[0], view.state_size, view.scale.shape[-1]
        batch = view.batch()
        like = view.x0.detach()
        centre = view.reference()[:-1] if start is None else start.states[:-1]
        width = self._measure_width(view, start, centre)
        self.register_buffer("width", width)
        lower = torch.tril_indices(count, count, -1)
        self._lower = (lower[0].tolist(), lower[1].tolist())
        self.count, self.size = count, size
        if amortised:
            self.encoder = LikelihoodEncoder(view.dim, context).to(like)
            self.head = nn.Linear(context, count + count * size + count + len(self._lower[0])).to(like)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            if view.start is not None:
                self.start_head = nn.Linear(context, 2 * view.start.mean.shape[-1]).to(like)
                nn.init.zeros_(self.start_head.weight)
                nn.init.zeros_(self.start_head.bias)
        else:
            self.register_buffer("centre", centre.detach().clone())
            if start is None:
                offset = like.new_zeros(steps, *batch, count)
                gain = like.new_zeros(steps, *batch, count, size)
                factor = torch.eye(count).to(like).expand(steps, *batch, count, count)
            else:
                gains = _absolute(start.posterior, start.states)
                offset = gains.offset + (gains.gain @ centre.unsqueeze(-1)).squeeze(-1)
                gain, factor = gains.gain * width, gains.factor
            self.offset = nn.Parameter(offset.detach().clone())
            self.gain = nn.Parameter(gain.detach().clone())
            self.log_diagonal = nn.Parameter(
                torch.diagonal(factor, dim1=-2, dim2=-1).log().detach().clone().contiguous()
            )
            self.lower = nn.Parameter(factor[..., self._lower[0], self._lower[1]].detach().clone())
            if view.start is not None:
                self._set_start(view.start, start)
        self.network = None
        if hidden:
            ts = view.fn.ts
            self.network = ControlNetwork(
                size,
                count,
                hidden,
                context if amortised else 0,
                start=float(ts[0]),
                span=float(ts[-1] - ts[0]),
            ).to(like)

    def _set_start(self, prior: StartPrior, start: LinearStart | None) -> None:
        if start is not None and start.start_mean is not None and start.start_factor is not None:
            mean, factor = start.start_mean, start.start_factor
        else:
            mean = prior.mean
            factor = torch.linalg.cholesky(torch.linalg.inv(prior.precision))
        self.start_mean = nn.Parameter(mean.detach().clone().contiguous())
        diagonal = torch.diagonal(factor, dim1=-2, dim2=-1).log()
        self.start_log_diagonal = nn.Parameter(diagonal.detach().clone().contiguous())
        self.start_lower = nn.Parameter(torch.tril(factor, -1).detach().clone())

    def free_start(self) -> StartPosterior | None:
        """Return the free posterior of a random start; None if nothing is random."""
        if not self.random_start:
            return None
        tril = torch.tril(self.start_lower, -1) + torch.diag_embed(self.start_log_diagonal.exp())
        return StartPosterior(self.start_mean, tril)

    @staticmethod
    def _measure_width(view: SiteView, start: LinearStart | None, centre: Tensor) -> Tensor:
        """Return the spread of the full state around the centre, over time and a few simulated paths."""
        generator = torch.Generator(centre.device).manual_seed(0)
        with torch.no_grad():
            gains = None if start is None else _absolute(start.posterior, start.states)
            feedback = None if gains is None else Feedback(gains, view.scale)
            squares = []
            for _ in range(8):
                zero = view.zero_increments()
                e = torch.randn(zero.shape, generator=generator, dtype=zero.dtype, device=zero.device)
                scale = view.scale.reshape(view.scale.shape[0], *(1,) * (e.ndim - 2), -1)
                states = view.run(e * scale, feedback=feedback)
                squares.append(((states[1:] - centre) ** 2).flatten(0, -2).mean(0))
            width = torch.stack(squares).mean(0).sqrt()
        good = torch.isfinite(width) & (width > 1e-8)
        return torch.where(good, width, torch.ones_like(width))

    def _factor(self, log_diagonal: Tensor, lower: Tensor) -> Tensor:
        factor = torch.diag_embed(log_diagonal.exp())
        if not self._lower[0]:
            return factor
        below = torch.zeros_like(factor)
        below[..., self._lower[0], self._lower[1]] = lower
        return factor + below

    def free_feedback(self, scale: Tensor) -> Feedback:
        """Return the feedback law of free parameters, for increments of the prior's ``scale (N, M)``."""
        factor = self._factor(self.log_diagonal, self.lower)
        return Feedback(Gains(self.offset, self.gain, factor, self.centre, self.width), scale, self.network)

    def read(
        self, view: SiteView, reference: Tensor, data: Quadratic
    ) -> tuple[Feedback, StartPosterior | None]:
        """Return the feedback law that the encoder reads off the likelihood around a reference path."""
        summary = self.encoder(view.fn.ts, reference[..., : view.dim], data.precision, data.linear)
        out = self.head(summary[1:])
        count, size = self.count, self.size
        offset, gain, log_diagonal, lower = out.split([count, count * size, count, len(self._lower[0])], -1)
        gains = Gains(
            offset,
            gain.unflatten(-1, (count, size)),
            self._factor(log_diagonal, lower),
            reference[:-1],
            self.width,
        )
        start = None
        if view.start is not None:
            stddev = torch.diagonal(view.start.precision, dim1=-2, dim2=-1).rsqrt()
            shift, log_scale = self.start_head(summary[0]).chunk(2, -1)
            start = StartPosterior(
                view.start.mean + stddev * shift, torch.diag_embed(stddev * log_scale.exp())
            )
        context = summary[1:] if self.network is not None else None
        return Feedback(gains, view.scale, self.network, context), start
