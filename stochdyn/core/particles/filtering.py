r"""The particle filter: weighted particles that move, meet data and are resampled, for any law that can be simulated.

With weights :math:`w_k^i` of particle :math:`i` at observation :math:`k` (the likelihood there, times prior over proposal),

.. math:: \hat p(y_{1:K})=\prod_k\sum_i\bar w_{k-1}^i\,w_k^i

is an unbiased estimate of the evidence, whatever the proposals are and whenever particles are resampled.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_positive_int, check_real, values_are_checked
from stochdyn.core.law.marginals import Generator
from stochdyn.core.particles.resampling import (
    comb_indices,
    comb_offset,
    systematic,
    take_particles,
)
from stochdyn.errors import ApproximationWarning

__all__ = ["ParticleModel", "ParticleRun", "run_particles", "run_unjudged"]

# Fewer independent particles than this at some observation: the estimate there rests on almost nothing.
_FEW = 10.0
_SHARE = 0.1


class ParticleModel(ABC):
    """What a particle filter moves: states, and the weights that data give them.

    Implement it for a law of your own; :func:`stochdyn.infer.particle_filter` has one for equations. Nothing in it should wait
    for the device.

    Attributes:
        num_times: The number of observations.
        device: The device of the states.
    """

    num_times: int
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def start(self, num_particles: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return states ``(num_particles, *batch, Z)`` before the first observation, and their log weights ``(num_particles, *batch)``."""

    def order(self, z: Tensor) -> Tensor | None:
        """Return the order ``(num_particles, *batch)`` in which alike particles are neighbours; None where there is no such order.

        Particles are handed to :meth:`advance` in this order, and resampled in it, so that points which fill a square evenly can
        choose both the particle and its noise: see :mod:`stochdyn.core.particles.lattice`.
        """
        return None

    @abstractmethod
    def advance(self, step: int, z: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Move states to an observation and weigh them.

        Args:
            step: The index of the observation.
            z: The states ``(num_particles, *batch, Z)`` at the one before, or at the start.
            generator: The source of randomness.

        Returns:
            The states at the observation, and the logarithms of their weights ``(num_particles, *batch)``: the likelihood, times
            prior over proposal.
        """


@dataclass(frozen=True, repr=False)
class ParticleRun:
    """What a particle filter has found.

    Attributes:
        log_evidence: The logarithm ``(*batch,)`` of an unbiased estimate of the evidence.
        ess: The number of independent particles ``(*batch, T)`` that the weighted ones were worth at each observation.
    """

    log_evidence: Tensor
    ess: Tensor
    # States, log weights and ancestors of each observation: they are put together when they are asked for, since an
    # evidence alone needs none of them.
    _rows: dict[str, Sequence[Tensor] | Tensor]

    def _together(self, name: str, axis: int) -> Tensor:
        rows = self._rows[name]
        if not isinstance(rows, Tensor):
            rows = self._rows[name] = torch.stack(list(rows)).movedim(0, axis)
        return rows

    @property
    def states(self) -> Tensor:
        """The particles ``(num_particles, *batch, T, Z)`` at the observations, before they were resampled."""
        return self._together("states", -2)

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of their weights ``(num_particles, *batch, T)``, normalised at each observation."""
        return self._together("log_weights", -1)

    @property
    def ancestors(self) -> Tensor:
        """The particle ``(num_particles, *batch, T)`` at the observation before from which each one comes."""
        return self._together("ancestors", -1)

    def __repr__(self) -> str:
        count, length = self.states.shape[0], self.states.shape[-2]
        worst = float(self.ess.min())
        return f"ParticleRun({count} particles, {length} observations, least effective number {worst:.0f})"

    @property
    def mean(self) -> Tensor:
        """The filtered means ``(*batch, T, Z)``: those of each state given the data up to it."""
        return (self.log_weights.exp().unsqueeze(-1) * self.states).sum(0)

    @property
    def covariance(self) -> Tensor:
        """The filtered covariances ``(*batch, T, Z, Z)``."""
        gap = self.states - self.mean
        weighted = self.log_weights.exp().unsqueeze(-1) * gap
        return torch.einsum("n...i,n...j->...ij", weighted, gap)

    @property
    def paths(self) -> Tensor:
        """Draws from the law of the states at all observations given all data, ``(num_particles, *batch, T, Z)``.

        They are the lines of descent of the last particles, equally weighted. Lines meet in few ancestors at early
        observations of long series (see :attr:`num_lines`): more particles or a guided filter keep more of them.
        """
        return self.draw_paths(self.states.shape[0])

    def draw_paths(self, num_draws: int, generator: Generator = 0) -> Tensor:
        """Draw lines of descent.

        Args:
            num_draws: The number of draws.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            The states ``(num_draws, *batch, T, Z)`` at the observations.
        """
        index = systematic(self.log_weights[..., -1], num_draws, generator)
        return self._trace(index)[0]

    @property
    def num_lines(self) -> Tensor:
        """The number ``(*batch, T)`` of different particles at each observation from which the last ones descend."""
        every = torch.arange(self.states.shape[0], device=self.states.device)
        every = every.reshape(-1, *(1,) * (self.log_weights.ndim - 2)).expand(self.log_weights.shape[:-1])
        index = self._trace(every)[1]
        ordered = index.sort(0).values
        return 1 + (ordered[1:] != ordered[:-1]).sum(0)

    def _trace(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states on the lines that end in the particles ``index``, and the indices along them."""
        rows, places = [], []
        for k in range(self.states.shape[-2] - 1, -1, -1):
            rows.append(take_particles(self.states[..., k, :], index))
            places.append(index)
            index = take_particles(self.ancestors[..., k], index)
        return torch.stack(rows[::-1], -2), torch.stack(places[::-1], -1)


def run_particles(
    model: ParticleModel,
    num_particles: int = 1000,
    threshold: float = 0.5,
    generator: Generator = None,
) -> ParticleRun:
    """Run a particle filter.

    Args:
        model: What is moved and weighed.
        num_particles: The number of particles.
        threshold: The share of the particles below which their effective number makes a member of the batch resample: 1 at
            every observation, 0 never.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Evidence, filtered moments, paths and effective numbers.

    Warns:
        ApproximationWarning: If fewer than ten particles, and fewer than a tenth of them, matter at an observation.

    Example:
        >>> class Walk(ParticleModel):
        ...     num_times = 3
        ...     def start(self, num_particles, generator):
        ...         return torch.zeros(num_particles, 1), torch.zeros(num_particles)
        ...     def advance(self, step, z, generator):
        ...         z = z + torch.randn(z.shape, generator=generator)
        ...         return z, -0.5 * (z[..., 0] - 1.0) ** 2
        >>> run_particles(Walk(), 100, generator=torch.Generator().manual_seed(0)).states.shape
        torch.Size([100, 3, 1])

    Reference:
        A. Doucet and A. M. Johansen, A tutorial on particle filtering and smoothing: fifteen years later, 2011.
    """
    check_positive_int(num_particles, "num_particles", 2)
    check_real(threshold, "threshold", minimum=0.0, maximum=1.0)
    run = run_unjudged(model, num_particles, float(threshold), generator)
    if values_are_checked():
        least = float(run.ess.min())
        if not least >= min(_FEW, _SHARE * num_particles):
            place = int(run.ess.reshape(-1, run.ess.shape[-1]).amin(0).argmin())
            warnings.warn(
                f"the particle filter collapses: {least:.1f} of {num_particles} particles matter at observation {place}. Take more "
                "particles, the guided filter (method='guided'), or look for an outlier or too small an observation noise there",
                ApproximationWarning,
                stacklevel=3,
            )
    return run


@torch.no_grad()
def run_unjudged(
    model: ParticleModel, count: int, threshold: float = 0.5, generator: Generator = None
) -> ParticleRun:
    """Run a particle filter and say nothing about it, as a chain does whose parameters may be wild; see :func:`run_particles`."""
    source = as_generator(generator, model.device)
    z, log_weight = model.start(count, source)
    every = torch.arange(count, device=z.device).reshape(-1, *(1,) * (log_weight.ndim - 1))
    every = every.expand(log_weight.shape)
    even = torch.full_like(log_weight, -math.log(count))
    # All at once, so that a draw doesn't depend on when others resample, nor on who looks.
    offsets = comb_offset(log_weight, source, model.num_times).unbind(0)
    # On the host a look costs next to nothing, and tells when there is nothing to do.
    looks = z.device.type == "cpu" and values_are_checked()
    bar = threshold * count if threshold < 1.0 else math.inf
    log_weight, weight, total, size = _normalised(log_weight + even)
    log_weight, weight, size = _possible(log_weight, weight, size, even)
    least = float(size.amin()) if looks else 0.0
    states, weights, sizes, ancestors = [], [], [], []
    for k in range(model.num_times):
        order = model.order(z)
        index = every if order is None else order
        if order is not None and bar < math.inf:
            log_weight = log_weight.gather(0, order)
        if threshold > 0.0 and not least >= bar:
            # Each member of the batch resamples when it has to; where none does, indices stay as they are.
            if order is None:
                drawn = comb_indices(weight, offsets[k], count)
            else:
                drawn = order.gather(0, comb_indices(weight.gather(0, order), offsets[k], count))
            worn = size < bar if bar < math.inf else None
            if worn is None or (looks and bool(worn.all())):
                log_weight, index = even, drawn
            else:
                index = torch.where(worn, drawn, index)
                log_weight = torch.where(worn, even, log_weight)
        if index is not every:
            z = take_particles(z, index)
        z, gained = model.advance(k, z, source)
        log_weight, weight, step, size = _normalised(log_weight + gained)
        if looks:
            least = float(size.amin())
        if not looks or least != least:
            log_weight, weight, size = _possible(log_weight, weight, size, even)
            least = float(size.amin()) if looks else 0.0
        total = total + step
        states.append(z)
        weights.append(log_weight)
        ancestors.append(index)
        sizes.append(size)
    rows: dict[str, Sequence[Tensor] | Tensor]
    rows = {"states": states, "log_weights": weights, "ancestors": ancestors}
    return ParticleRun(total, torch.stack(sizes, -1), rows)


def _normalised(log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normalised log weights, weights up to a factor, the logarithm of their sum, and their effective number.

    The number is NaN where the sum is zero.
    """
    largest = log_weight.amax(0).clamp_min_(torch.finfo(log_weight.dtype).min)
    weight = (log_weight - largest).exp_()
    total = weight.sum(0)
    size = total.square() / weight.square().sum(0)
    total = total.log_().add_(largest)
    return log_weight - total, weight, total, size


def _possible(
    log_weight: Tensor, weight: Tensor, size: Tensor, even: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights and effective numbers that are those of equal particles where none explains the data."""
    impossible = torch.isnan(size)
    return (
        torch.where(impossible, even, log_weight),
        torch.where(impossible, 1.0, weight),
        torch.where(impossible, float(len(even)), size),
    )
