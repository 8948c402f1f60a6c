r"""Particle filters of equations: the bootstrap filter and one that is guided by the linearised posterior.

The guided filter moves particles by the exact feedback law of the model linearised around its most probable path, and weighs them
by the potentials :math:`\psi_k(z)=\exp(-\tfrac12z^\top S_kz+\eta_k^\top z)` of that model, its likelihood of all later data:

.. math:: w_k=p(y_k\mid x_k)\,\prod_n\frac{p(\epsilon_n)}{q(\epsilon_n\mid z_n)}\,\frac{\psi_k(z_k)}{\psi_{k-1}(z_{k-1})} .

Any potentials leave the evidence unbiased; for a linear model the weights are all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_callable,
    check_choice,
    check_real,
    check_type,
    values_unchecked,
)
from stochdyn._transforms import recording
from stochdyn.core.law.initial import DistributionStart
from stochdyn.core.law.marginals import Generator
from stochdyn.core.particles.filtering import ParticleModel, ParticleRun, run_particles
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.stops import EulerTransitions
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, UnavailableError
from stochdyn.infer.distributions import PathIncrements
from stochdyn.infer.linearise import expand_likelihood, linear_posterior
from stochdyn.infer.mode import fit_linearised
from stochdyn.infer.seen import SeenEquation, draw_start
from stochdyn.infer.start import StartPrior, is_unconstrained
from stochdyn.infer.state_likelihood import StateLikelihood
from stochdyn.infer.view import SiteView, view_site

__all__ = ["BootstrapFilter", "GuidedFilter", "particle_filter"]

#: The log likelihood of observation k at states ``(num_particles, *batch, d)``, of each of them.
LogLikelihood = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class BootstrapFilter:
    """Particles that move by the equation and are weighed by the likelihood.

    Use it as the reference that asks for nothing: no derivatives, any likelihood. It needs many particles where observations are
    precise or far apart.

    Attributes:
        threshold: The share of the particles below which their effective number makes the filter resample: 1 at every
            observation, 0 never.

    Reference:
        N. J. Gordon, D. J. Salmond and A. F. M. Smith, Novel approach to nonlinear/non-Gaussian Bayesian state estimation, 1993.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_real(self.threshold, "threshold", minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class GuidedFilter:
    """Particles that move towards all later data, by the posterior of the linearised model.

    Use it for evidence of little noise with few particles: for a linear Gaussian model one particle is exact. It needs a drift and
    a likelihood that can be differentiated twice, and it may miss a mode that the most probable path doesn't see: compare it with
    the bootstrap filter once.

    Attributes:
        threshold: The share of the particles below which their effective number makes the filter resample: 1 at every
            observation, 0 never.
        max_iterations: The largest number of linearisations of the search for the most probable path.

    Reference:
        P. Guarniero, A. M. Johansen and A. Lee, The iterated auxiliary particle filter, 2017; J. Heng, A. N. Bishop,
        G. Deligiannidis and A. Doucet, Controlled sequential Monte Carlo, 2020.
    """

    threshold: float = 0.5
    max_iterations: int = 25

    def __post_init__(self) -> None:
        check_real(self.threshold, "threshold", minimum=0.0, maximum=1.0)
        check_real(self.max_iterations, "max_iterations", minimum=1)


_METHODS: dict[str, type[BootstrapFilter | GuidedFilter]] = {
    "bootstrap": BootstrapFilter,
    "guided": GuidedFilter,
}
FilterMethod = str | BootstrapFilter | GuidedFilter


def as_filter(method: FilterMethod) -> BootstrapFilter | GuidedFilter:
    """Return the method that a string names, or the method itself."""
    if isinstance(method, str):
        check_choice(method, tuple(_METHODS), "method")
        return _METHODS[method]()
    check_type(method, (BootstrapFilter, GuidedFilter), "method")
    return method


def particle_filter(
    sde: SDE,
    initial: Any,
    times: Any,
    log_likelihood: LogLikelihood,
    num_particles: int = 1000,
    *,
    method: FilterMethod = "bootstrap",
    start_time: Tensor | float = 0.0,
    dt: float | None = None,
    generator: Generator = None,
) -> ParticleRun:
    """Estimate the evidence of any data of an equation without bias, with filtered states and paths.

    The equation takes Euler steps, as :func:`sample_path` does on the same grid. Series and parameters on batch axes run at once,
    and nothing in the loop waits for the device.

    Args:
        sde: The equation. Parameters with batch axes broadcast with states ``(num_particles, *batch, d)``.
        initial: A distribution with event ``(d,)``, or a tensor for a fixed start.
        times: The strictly increasing times of the data, ``(T,)``, or ``(*batch, T)`` where every series has its own.
        log_likelihood: A function of the index of an observation and of states ``(num_particles, *batch, d)`` at its time, which
            returns the log likelihood ``(num_particles, *batch)`` of that observation. :class:`StateLikelihood` makes one of data
            and their distribution, with NaN for missing values.
        num_particles: The number of particles.
        method: ``"bootstrap"``, ``"guided"``, or :class:`BootstrapFilter` or :class:`GuidedFilter` with options.
        start_time: The time at which ``initial`` holds, or one per series ``(*batch,)``.
        dt: The largest Euler step, in the unit of the times; None takes steps that resolve the equation, as
            :class:`NonlinearObservations` says.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Evidence, filtered moments, paths and effective numbers of particles.

    Raises:
        TimeGridError: If the times don't increase strictly, or begin before ``start_time``.
        ShapeError: If equation, start and likelihood don't fit each other.
        UnavailableError: If the guided filter meets series whose own times need different numbers of steps.
        NonFiniteError: If the guided filter finds no path of finite likelihood.

    Warns:
        ApproximationWarning: If fewer than ten particles, and fewer than a tenth of them, matter at an observation.

    Example:
        >>> import stochdyn as sd, pyro.distributions as dist
        >>> well = sd.SDE(lambda t, x: 4 * x * (1 - x**2), 0.6)
        >>> y = torch.tensor([-0.8, -0.2, 0.9])
        >>> data = sd.infer.StateLikelihood(lambda x: dist.Normal(x[..., 0], 0.3), y)
        >>> run = particle_filter(well, torch.tensor([-1.0]), [1.0, 2.0, 3.0], data, 500, dt=0.05, generator=0)
        >>> run.log_evidence.shape, run.paths.shape
        (torch.Size([]), torch.Size([500, 3, 1]))
    """
    check_callable(log_likelihood, "log_likelihood", "a function of an index and states")
    way = as_filter(method)
    with torch.no_grad():
        model = particles_of(SeenEquation.at(sde, initial, times, start_time, dt), log_likelihood, way)
    return run_particles(model, num_particles, way.threshold, as_generator(generator, model.device))


def particles_of(
    seen: SeenEquation, log_likelihood: LogLikelihood, way: BootstrapFilter | GuidedFilter
) -> ParticleModel:
    """Return the particles of an equation that is seen through a likelihood.

    Args:
        seen: The equation with its start and its grid.
        log_likelihood: The likelihood, as :func:`particle_filter` takes it.
        way: How particles move.

    Raises:
        ShapeError: If the likelihood doesn't fit the equation.
        InvalidInputError: If it returns no tensor.
    """
    law, probe, batch = seen.initial, seen.probe, seen.batch
    with torch.no_grad():
        # Leading axes of size one tell apart what the likelihood has by itself, such as the series of the data.
        shown = log_likelihood(0, probe.expand(*batch, law.dim).reshape(*(1,) * _AXES, *batch, law.dim))
        if not isinstance(shown, Tensor):
            raise InvalidInputError("log_likelihood must return a tensor", got=type(shown).__name__)
        own = list(shown.shape)
        while own and own[0] == 1:
            own.pop(0)
        try:
            batch = torch.broadcast_shapes(batch, tuple(own))
            shown = log_likelihood(0, probe.expand(*batch, law.dim).expand(3, *batch, law.dim))
        except RuntimeError as error:
            raise ShapeError(
                "log_likelihood has batch axes that don't fit the equation",
                got=tuple(shown.shape),
                expected=f"(num_particles, {', '.join(map(str, batch))})",
            ) from error
        if shown.shape != (3, *batch):
            raise ShapeError(
                "log_likelihood must return one value per particle and member of the batch",
                got=f"shape {tuple(shown.shape)} for states {(3, *batch, law.dim)}",
                hint="sum over the components of an observation, by to_event(1)",
            )
        model = _EquationParticles(seen, log_likelihood, batch)
        return _GuidedParticles(model, way.max_iterations) if isinstance(way, GuidedFilter) else model


class _EquationParticles(ParticleModel):
    """Particles that move by the equation."""

    def __init__(self, seen: SeenEquation, log_likelihood: LogLikelihood, batch: torch.Size) -> None:
        sde, stops = seen.sde, seen.stops
        self.sde, self.initial, self.stops = sde, seen.initial, stops
        self.log_likelihood, self.batch, self.probe = log_likelihood, batch, seen.probe
        probe = seen.probe
        self.num_times, self.device = len(stops.counts), probe.device
        self.chain = EulerTransitions(sde, stops, probe)
        self.dim = self.chain.dim
        self._nothing = probe.new_tensor(-torch.inf)
        self.factor = sde.noise.initial_factor(dtype=probe.dtype, device=probe.device)

    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw states from the law of the start, with the past of the noise."""
        shape = (num_particles, *self.batch)
        x = draw_start(self.initial, shape, generator)
        past = None
        if self.factor is not None:
            size = (*shape, self.chain.channels, self.factor.shape[0])
            past = torch.randn(size, generator=generator, dtype=x.dtype, device=x.device)
        return self.full(x, past), x.new_zeros(shape)

    def full(self, x: Tensor, past: Tensor | None) -> Tensor:
        """Return full states ``(..., Z)`` of states and standard normals ``(..., m, Q)`` of the past."""
        memory = self.chain.size - self.dim
        if not memory:
            return x
        if past is None or self.factor is None:
            return torch.nn.functional.pad(x, (0, memory))
        return torch.cat([x, (past @ self.factor).flatten(-2)], -1)

    def normals(self, count: int, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the standard normals of ``count`` steps."""
        shape = (count, *z.shape[:-1], self.chain.width)
        return torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)

    def advance(self, step: int, z: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Move states to an observation and weigh them by its likelihood."""
        span = self.chain.span(step)
        if len(span):
            for n, normal in zip(span, self.normals(len(span), z, generator).unbind(0), strict=True):
                z = self.chain.push(n, z, normal)
        return z, self.weigh(step, z)

    def weigh(self, step: int, z: Tensor) -> Tensor:
        """Return the log likelihood; a state of which it isn't a number is impossible."""
        found = self.log_likelihood(step, z[..., : self.dim])
        return torch.fmax(found, self._nothing.to(found))


class _GuidedParticles(ParticleModel):
    """Particles that move by the feedback law of the linearised model."""

    def __init__(self, free: _EquationParticles, iterations: int) -> None:
        self.free, self.num_times, self.device = free, free.num_times, free.device
        ts = free.stops.ts
        if ts.ndim > 1 and bool((ts[..., 1:] <= ts[..., :-1]).any()):
            raise UnavailableError(
                "the guided filter takes no empty steps: give series of their own times no dt, or take method='bootstrap'"
            )
        if ts.shape[-1] < 2:
            raise UnavailableError("the guided filter has nothing to guide: all data lie at the start")
        view, states, increments = self._most_probable(iterations)
        index = free.stops.index
        data = expand_likelihood(self._total, states[..., : free.dim])
        posterior = linear_posterior(view.linear_steps(states, increments), data)
        assert posterior.onward is not None
        like = free.probe
        # Around the path: ln psi = -1/2 d S d + s d of the deviation d, which loses no digits where states are large.
        precision, linear = posterior.onward
        precision = precision.index_select(0, index)
        linear = linear.index_select(0, index)
        own = torch.nn.functional.pad(
            data.precision.index_select(0, index).double(), (0, view.state_size - free.dim) * 2
        )
        pull = torch.nn.functional.pad(
            data.linear.index_select(0, index).double(), (0, view.state_size - free.dim)
        )
        seen = states.index_select(0, index).double()
        precision = precision - own
        linear = linear - pull - _times(precision, seen)
        first = posterior.start_linear - _times(posterior.start_precision, states[0].double())
        # Nothing comes after the last observation.
        precision[-1].zero_()
        linear[-1].zero_()
        law = posterior.law
        assert law.centre is not None
        centre = states[:-1].double()
        offset = law.mean(centre)
        self.centre, self.offset, self.gain, self.factor = (
            x.to(like.dtype).unbind(0) for x in (centre, offset, law.gain.mT, law.factor)
        )
        self.shrink = law.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(like.dtype).unbind(0)
        self.potentials = [
            (c.to(like.dtype), s.to(like.dtype), v.to(like.dtype))
            for c, s, v in zip(
                [states[0], *seen.unbind(0)],
                [posterior.start_precision, *precision.unbind(0)],
                [first, *linear.unbind(0)],
                strict=True,
            )
        ]
        self.begin: tuple[StartPrior, Tensor, Tensor] | None = None
        law0 = view.start_law
        if view.start is not None and (law0 is None or is_unconstrained(law0)):
            mean, root = view.start.posterior(posterior.start_precision, posterior.start_linear)
            self.begin = view.start, mean.to(like.dtype), root.to(like.dtype)

    def _total(self, path: Tensor) -> Tensor:
        """Return the log likelihood ``(*batch,)`` of a path ``(T, *batch, d)``."""
        free = self.free
        seen = path.index_select(0, free.stops.index)
        if isinstance(free.log_likelihood, StateLikelihood):
            # One call for all times, where a function has to be asked for each.
            return free.log_likelihood.along(seen).expand(free.num_times, *free.batch).sum(0)
        rows = [free.log_likelihood(k, seen[k].unsqueeze(0))[0] for k in range(free.num_times)]
        return torch.stack([r.expand(free.batch) for r in rows]).sum(0)

    def _most_probable(self, iterations: int) -> tuple[SiteView, Tensor, Tensor]:
        free = self.free
        x0 = free.probe.expand(*free.batch, free.dim)
        random = isinstance(free.initial, DistributionStart)
        fn = PathIncrements(free.sde, x0, free.stops.ts)
        view = view_site(
            fn,
            "x",
            free.initial.distribution if random else None,
            past=free.factor is not None,
            draws=free.batch,
        )
        try:
            with recording(), values_unchecked():
                found = fit_linearised(view, lambda path: expand_likelihood(self._total, path), iterations)
        except NonFiniteError as error:
            raise NonFiniteError(
                "the guided filter finds no path of finite likelihood to start from",
                got=str(error)[:80],
                hint="use method='bootstrap'",
            ) from error
        return view, found.states.detach(), found.increments.detach()

    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw states from the start of the linearised posterior."""
        free = self.free
        if self.begin is None:
            z, weight = free.start(num_particles, generator)
            return z, weight + self._potential(0, z)
        prior, mean, root = self.begin
        shape = (num_particles, *free.batch, mean.shape[-1])
        normal = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
        value = mean + _times(root, normal)
        state, past = prior.split(value)
        x = free.probe.expand(*shape[:-1], free.dim) if state is None else state
        z = free.full(x, past)
        # ln p / q of the start, up to the constants that both have.
        weight = 0.5 * normal.square().sum(-1) + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        weight = weight + 0.5 * normal.shape[-1] * _LOG_2PI
        if state is not None:
            weight = weight + free.initial.log_prob(state)
        if past is not None:
            weight = weight - 0.5 * (past.square().sum((-2, -1)) + past.shape[-1] * past.shape[-2] * _LOG_2PI)
        return z, weight + self._potential(0, z)

    def advance(self, step: int, z: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Move states to an observation by the feedback law, and weigh them."""
        free, span = self.free, self.free.chain.span(step)
        weight = -self._potential(step, z)
        if len(span):
            noise = free.normals(len(span), z, generator)
            for n, normal in zip(span, noise.unbind(0), strict=True):
                # e = k + K (z - c) + L e', so ln p(e) / q(e) = (|e'|^2 - |e|^2) / 2 + ln det L.
                e = self.offset[n] + _rows(z - self.centre[n], self.gain[n]) + _times(self.factor[n], normal)
                weight = weight + 0.5 * (normal.square() - e.square()).sum(-1) + self.shrink[n]
                z = free.chain.push(n, z, e)
        return z, weight + free.weigh(step, z) + self._potential(step + 1, z)

    def _potential(self, place: int, z: Tensor) -> Tensor:
        centre, precision, linear = self.potentials[place]
        gap = z - centre
        return (gap * (linear - 0.5 * _times(precision, gap))).sum(-1)


_LOG_2PI = 1.8378770664093453
# More axes than any batch has.
_AXES = 12


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    if matrix.shape[-1] == 1 and matrix.shape[-2] == 1:
        return matrix[..., 0] * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1) if matrix.ndim > 2 else vector @ matrix.mT


def _rows(vector: Tensor, gain: Tensor) -> Tensor:
    """Return ``K v`` of the transposed gain."""
    return vector @ gain if gain.ndim == 2 else (vector.unsqueeze(-2) @ gain).squeeze(-2)
