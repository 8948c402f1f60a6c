r"""Particle filters of equations: the bootstrap filter and one that is guided by the linearised posterior.

The guided filter moves particles by the exact feedback law of the model linearised around its most probable path, and weighs them
by the potentials :math:`\psi_k(z)=\exp(-\tfrac12z^\top S_kz+\eta_k^\top z)` of that model, its likelihood of all later data:

.. math:: w_k=p(y_k\mid x_k)\,\prod_n\frac{p(\epsilon_n)}{q(\epsilon_n\mid z_n)}\,\frac{\psi_k(z_k)}{\psi_{k-1}(z_{k-1})} .

Any potentials leave the evidence unbiased; for a linear model the weights are all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from stochdyn.core.particles.filtering import ParticleModel, ParticleRun, run_particles, run_unjudged
from stochdyn.core.particles.lattice import even_normals, even_shares, plain_normals
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
    precise or far apart. States on a line with one noise are kept in order and take evenly spread noise, which leaves the evidence
    unbiased and makes its variance fall faster than the inverse of the number of particles.

    Attributes:
        threshold: The share of the particles below which their effective number makes the filter resample: 1 at every
            observation, 0 never; None for 0.9 where particles stand on a line, whose noise is even, and 0.5 elsewhere.

    Reference:
        N. J. Gordon, D. J. Salmond and A. F. M. Smith, Novel approach to nonlinear/non-Gaussian Bayesian state estimation, 1993.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_real(self.threshold, "threshold", minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class GuidedFilter:
    """Particles that move towards all later data, by the posterior of the linearised model.

    Use it for evidence of little noise with few particles: for a linear Gaussian model one particle is exact. It needs a drift and
    a likelihood that can be differentiated twice. Series whose posterior has more modes than the most probable path sees, as two
    short runs tell, are moved freely, as by the bootstrap filter.

    Attributes:
        threshold: The share of the particles below which their effective number makes the filter resample: 1 at every
            observation, 0 never; None for 0.9 where particles stand on a line, whose noise is even, and 0.5 elsewhere.
        max_iterations: The largest number of linearisations of the search for the most probable path.

    Reference:
        P. Guarniero, A. M. Johansen and A. Lee, The iterated auxiliary particle filter, 2017; J. Heng, A. N. Bishop,
        G. Deligiannidis and A. Doucet, Controlled sequential Monte Carlo, 2020.
    """

    threshold: float | None = None
    max_iterations: int = 25

    def __post_init__(self) -> None:
        if self.threshold is not None:
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
    return run_particles(
        model, num_particles, threshold_of(way, model), as_generator(generator, model.device)
    )


def particles_of(
    seen: SeenEquation, log_likelihood: LogLikelihood, way: BootstrapFilter | GuidedFilter
) -> _EquationParticles | _GuidedParticles:
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


def threshold_of(way: BootstrapFilter | GuidedFilter, model: _EquationParticles | _GuidedParticles) -> float:
    """Return the share of effective particles below which a filter resamples."""
    if way.threshold is not None:
        return float(way.threshold)
    return _EAGER if model.ordered else _LAZY


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
        self.impossible = probe.new_tensor(-torch.inf)
        self.factor = sde.noise.initial_factor(dtype=probe.dtype, device=probe.device)
        #: Whether neighbours are alike, so that even noise pays: states on a line, driven by one noise.
        self.ordered = self.chain.size == 1 and self.chain.width == 1
        # The first steps after an observation find the particles in order.
        self._first = {span.start for k in range(self.num_times) if len(span := self.chain.span(k))}
        self._stream: Iterator[Tensor] = iter(())

    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw states from the law of the start, with the past of the noise."""
        shape = (num_particles, *self.batch)
        self.begin_noise(num_particles, generator)
        x = self._even_start(shape, generator) if self.ordered else None
        if x is None:
            x = draw_start(self.initial, shape, generator)
        past = None
        if self.factor is not None:
            size = (*shape, self.chain.channels, self.factor.shape[0])
            past = torch.randn(size, generator=generator, dtype=x.dtype, device=x.device)
        return self.full(x, past), x.new_zeros(shape)

    def begin_noise(self, num_particles: int, generator: torch.Generator | None) -> None:
        """Begin the stream of standard normals of all steps."""
        shape = (num_particles, *self.batch, self.chain.width)
        draw = even_normals if self.ordered else plain_normals
        self._stream = draw(self.chain.num_steps, shape, self.probe, generator)

    def _even_start(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor | None:
        """Return starts at evenly spread quantiles, where their law has them."""
        if not isinstance(self.initial, DistributionStart):
            return None
        law: Any = self.initial.distribution
        while isinstance(law, torch.distributions.Independent):
            law = law.base_dist
        if law.event_shape:
            return None
        try:
            return law.icdf(even_shares((*shape, 1), self.probe, generator)).expand(*shape, 1)
        except NotImplementedError:
            return None

    def full(self, x: Tensor, past: Tensor | None) -> Tensor:
        """Return full states ``(..., Z)`` of states and standard normals ``(..., m, Q)`` of the past."""
        memory = self.chain.size - self.dim
        if not memory:
            return x
        if past is None or self.factor is None:
            return torch.nn.functional.pad(x, (0, memory))
        return torch.cat([x, (past @ self.factor).flatten(-2)], -1)

    def order(self, z: Tensor) -> Tensor | None:
        """Return the order of the states on their line; states of several components have none."""
        return z[..., 0].argsort(0) if self.ordered else None

    def normal(self, n: int, z: Tensor) -> Tensor:
        """Return the standard normals of step ``n``, those of even noise by the ranks of the states."""
        normal = next(self._stream)
        if not self.ordered or n in self._first:
            return normal
        return torch.empty_like(normal).scatter_(0, z.argsort(0), normal)

    def advance(self, step: int, z: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Move states to an observation and weigh them by its likelihood."""
        for n in self.chain.span(step):
            z = self.chain.push(n, z, self.normal(n, z))
        return z, self.weigh(step, z)

    def weigh(self, step: int, z: Tensor) -> Tensor:
        """Return the log likelihood; a state of which it isn't a number is impossible."""
        x = z[..., : self.dim]
        try:
            found = self.log_likelihood(step, x)
        except ValueError:
            # Distributions refuse states that aren't numbers; another particle stands in for those that have exploded.
            sound = torch.isfinite(x).all(-1)
            if bool(sound.all()):
                raise
            if not bool(sound.any()):
                raise NonFiniteError(
                    f"all particles explode before observation {step}",
                    hint="take smaller steps by dt, or a narrower start",
                ) from None
            found = self.log_likelihood(step, torch.where(sound.unsqueeze(-1), x, x[sound][0]))
            found = torch.where(sound, found, self.impossible.to(found))
        return torch.fmax(found, self.impossible.to(found))


class _GuidedParticles(ParticleModel):
    """Particles that move by the feedback law of the linearised model."""

    def __init__(self, free: _EquationParticles, iterations: int) -> None:
        self.free, self.num_times, self.device = free, free.num_times, free.device
        self.ordered = free.ordered
        self.begin: tuple[StartPrior, Tensor, Tensor] | None = None
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
        law0 = view.start_law
        guided_start = view.start is not None and (law0 is None or is_unconstrained(law0))
        self._begin = view.start if guided_start else None
        self._centre, self._offset, self._gain, self._factor = (
            centre,
            law.mean(centre),
            law.gain.mT,
            law.factor,
        )
        self._places = torch.cat([states[:1].double(), seen])
        self._precision = torch.cat([posterior.start_precision.unsqueeze(0), precision])
        self._linear = torch.cat([first.unsqueeze(0), linear])
        self._start_linear = posterior.start_linear
        self._aim(like.new_ones((), dtype=torch.bool))
        self._aim(self._helps())

    def _aim(self, guided: Tensor) -> None:
        """Guide the series that ``guided (*batch,)`` says, and let the others move freely."""
        like = self.free.probe
        share = guided.double()
        row = share.unsqueeze(-1)
        table = row.unsqueeze(-1)
        eye = torch.eye(self._factor.shape[-1], dtype=torch.float64, device=like.device)
        factor = torch.where(table > 0, self._factor, eye)
        self.centre, self.offset, self.gain, self.factor = (
            x.to(like.dtype).unbind(0) for x in (self._centre, row * self._offset, table * self._gain, factor)
        )
        self.shrink = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(like.dtype).unbind(0)
        precision, linear = table * self._precision, row * self._linear
        self.potentials = [x.to(like.dtype).unbind(0) for x in (self._places, precision, linear)]
        self.begin = None
        if self._begin is not None:
            mean, root = self._begin.posterior(precision[0], row * self._start_linear)
            self.begin = self._begin, mean.to(like.dtype), root.to(like.dtype)

    def _helps(self) -> Tensor:
        """Return where ``(*batch,)`` particles are better off with the guide, as short runs with draws of their own tell.

        Estimates without bias seldom exceed the evidence by much, so that a guide whose estimate free particles beat by more than
        their own error misses a part of the posterior, however well its particles agree with each other.
        """
        guided, free = (
            run_unjudged(
                model,
                _PILOTS,
                threshold_of(GuidedFilter(), self),
                torch.Generator(self.device).manual_seed(0),
            )
            for model in (self, self.free)
        )
        worn, error = ((_PILOTS / run.ess - 1.0).sum(-1) / _PILOTS for run in (guided, free))
        return (worn <= error) & ~(free.log_evidence - guided.log_evidence > _BEATEN + 2 * error.sqrt())

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

    def order(self, z: Tensor) -> Tensor | None:
        """Return the order of the states on their line; states of several components have none."""
        return self.free.order(z)

    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw states from the start of the linearised posterior."""
        free = self.free
        if self.begin is None:
            z, weight = free.start(num_particles, generator)
            return z, weight + self._potential(0, z)
        free.begin_noise(num_particles, generator)
        prior, mean, root = self.begin
        shape = (num_particles, *free.batch, mean.shape[-1])
        if free.ordered:
            normal = torch.special.ndtri(even_shares(shape, mean, generator))
        else:
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
        free = self.free
        weight = -self._potential(step, z)
        for n in free.chain.span(step):
            normal = free.normal(n, z)
            # e = k + K (z - c) + L e', so ln p(e) / q(e) = (|e'|^2 - |e|^2) / 2 + ln det L.
            e = self.offset[n] + _rows(z - self.centre[n], self.gain[n]) + _times(self.factor[n], normal)
            weight = weight + 0.5 * (normal.square() - e.square()).sum(-1) + self.shrink[n]
            z = free.chain.push(n, z, e)
        weight = weight + free.weigh(step, z) + self._potential(step + 1, z)
        # Nothing keeps a particle that has exploded.
        return z, torch.fmax(weight, free.impossible.to(weight))

    def _potential(self, place: int, z: Tensor) -> Tensor:
        centre, precision, linear = (x[place] for x in self.potentials)
        gap = z - centre
        return (gap * (linear - 0.5 * _times(precision, gap))).sum(-1)


_LOG_2PI = 1.8378770664093453
# Resampling costs next to nothing where it is in order, and keeps particles equal, which is what even noise is for.
_EAGER, _LAZY = 0.9, 0.5
# Particles of the short runs that tell whether a guide helps, and the excess of log evidence beyond two errors that tells that not.
_PILOTS = 200
_BEATEN = 0.5
# More axes than any batch has.
_AXES = 12


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    if matrix.shape[-1] == 1 and matrix.shape[-2] == 1:
        return matrix[..., 0] * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1) if matrix.ndim > 2 else vector @ matrix.mT


def _rows(vector: Tensor, gain: Tensor) -> Tensor:
    """Return ``K v`` of the transposed gain."""
    return vector @ gain if gain.ndim == 2 else (vector.unsqueeze(-2) @ gain).squeeze(-2)
