"""Observations of any law of an equation's path as a Pyro distribution, whose density a particle filter estimates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import as_tensor, check_callable, check_positive_int, values_unchecked
from stochdyn.core.particles.filtering import run_unjudged
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ShapeError, UnavailableError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.infer.particles import FilterMethod, as_filter, particles_of, threshold_of
from stochdyn.infer.seen import SeenEquation
from stochdyn.infer.state_likelihood import StateLikelihood

__all__ = ["ParticleObservations", "ParticlesInSites"]


class ParticleObservations(LawDistribution):
    r"""Observations whose law given the state is any distribution, with event ``(T, *event)``; the path is integrated out.

    The density is the unbiased estimate of a particle filter, drawn anew at every call. It has no gradient: use it with
    ``fit_posterior(..., method="pmmh")``, whose chain is exact for any number of particles, and
    :class:`NonlinearObservations` for everything that needs gradients.

    Args:
        sde: The equation. Parameters with batch axes broadcast with states ``(*batch, d)``, as in :class:`DiffusionPath`.
        initial: A distribution with event ``(d,)``, or a tensor for a fixed start.
        times: The strictly increasing times of the data, ``(T,)``, or ``(*batch, T)`` where every series has its own.
        observe: The function from states ``(..., d)`` to the distribution of an observation, with batch ``(...)``.
        num_particles: The number of particles.
        method: ``"bootstrap"``, ``"guided"``, or :class:`BootstrapFilter` or :class:`GuidedFilter` with options.
        start_time: The time at which ``initial`` holds, or one per series ``(*batch,)``.
        dt: The largest Euler step, in the unit of the times; None takes steps that resolve the equation, as
            :class:`NonlinearObservations` says.

    Raises:
        TimeGridError: If the times don't increase strictly, or begin before ``start_time``.
        UnavailableError: By ``log_prob``, if a gradient of the parameters is asked for.

    Example:
        >>> import stochdyn as sd, pyro.distributions as dist
        >>> sde = sd.SDE(lambda t, x: 1 - 0.1 * x.exp(), 0.2)
        >>> y = ParticleObservations(sde, torch.zeros(1), [1.0, 2.0], lambda x: dist.Poisson(x.exp()).to_event(1))
        >>> y.event_shape, y.log_prob(torch.tensor([[2.0], [3.0]])).shape
        (torch.Size([2, 1]), torch.Size([]))
    """

    has_rsample = False
    _carried = ("seen", "times", "observe", "num_particles", "method", "silent", "_support")

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        times: Any,
        observe: Callable[[Tensor], Any],
        num_particles: int = 200,
        *,
        method: FilterMethod = "bootstrap",
        start_time: Tensor | float = 0.0,
        dt: float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_callable(observe, "observe", "a function from states to the distribution of an observation")
        check_positive_int(num_particles, "num_particles", 2)
        self.observe, self.num_particles, self.method = observe, num_particles, as_filter(method)
        #: Whether the density is left out, for what asks for everything else.
        self.silent = False
        self.seen = SeenEquation.at(sde, initial, times, start_time, dt)
        self.times, probe, batch = self.seen.times, self.seen.probe, self.seen.batch
        with torch.no_grad():
            law = observe(probe.expand(*batch, probe.shape[-1]))
        batch = torch.broadcast_shapes(batch, law.batch_shape)
        self._support = constraints.independent(law.support, 1)
        super().__init__(
            batch, torch.Size((self.times.shape[-1], *law.event_shape)), validate_args=validate_args
        )

    @property
    def support(self) -> constraints.Constraint:
        """That of the observations, at all times."""
        return self._support

    def with_particles(self, num_particles: int | None) -> ParticleObservations:
        """Return the same law with another number of particles, or without its density for None."""
        new = copy.copy(self)
        new.silent = num_particles is None
        new.num_particles = self.num_particles if num_particles is None else num_particles
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, T, *event)``: paths by Euler steps, and observations of them."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            return self.observe(self.seen.states(tuple(shape))).sample().movedim(0, len(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return an estimate of the log density ``(*batch,)`` of ``value (..., T, *event)``; NaN is missing."""
        value = as_tensor(value, "value", missing=True)
        size = len(self.event_shape)
        if value.shape[value.ndim - size :] != self.event_shape:
            raise ShapeError(
                "the data don't fit the times and the law of the observations",
                got=f"shape {tuple(value.shape)}",
                expected=f"(..., {', '.join(map(str, self.event_shape))})",
            )
        like = self.seen.probe
        batch = torch.broadcast_shapes(value.shape[: value.ndim - size], self.batch_shape)
        if self.silent:
            return like.new_zeros(batch)
        if torch.is_grad_enabled() and self.seen.sde.drift(like.new_zeros(()), like).requires_grad:
            raise UnavailableError(
                "the estimate of a particle filter has no gradient",
                hint="fit_posterior(..., method='pmmh') needs none; NonlinearObservations has one",
            )
        with torch.no_grad(), values_unchecked():
            model = particles_of(self.seen, StateLikelihood(self.observe, value), self.method)
        # Parameters of a chain may be wild, where a poor estimate is no news.
        run = run_unjudged(model, self.num_particles, threshold_of(self.method, model))
        return run.log_evidence.expand(batch)


class ParticlesInSites(Messenger):
    """Give all :class:`ParticleObservations` of a model another number of particles, or none.

    Args:
        num_particles: The number of particles; None leaves the densities out.
    """

    def __init__(self, num_particles: int | None) -> None:
        super().__init__()
        self.num_particles = num_particles

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ParticleObservations):
            msg["fn"] = msg["fn"].with_particles(self.num_particles)
