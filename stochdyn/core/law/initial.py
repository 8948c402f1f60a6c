"""Initial laws: a distribution, a fixed point, or the simulated marginal of another law."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_finite, check_ndim
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError, SingularDiffusionError

if TYPE_CHECKING:
    from stochdyn.core.law.diffusion import DiffusionMeasure

__all__ = ["DistributionStart", "FixedStart", "InitialLaw", "SimulatedMarginal", "as_initial"]


class InitialLaw(nn.Module, ABC):
    """The law of the first grid point, a vector of ``dim`` components."""

    dim: int
    #: Whether the start is one known point, which then is no part of the event.
    fixed = False

    @abstractmethod
    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""

    @abstractmethod
    def log_prob(self, x0: Tensor) -> Tensor:
        """Return the log density at ``x0 (..., d)``; zero for a fixed start, which is no part of the event."""

    def log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        """Return ``log q0/p0 (x0)``, or its mean for ``estimator="rate"`` where that is known."""
        if other is self:
            return x0.new_zeros(x0.shape[:-1])
        if self.fixed != other.fixed:
            raise DiffusionMismatchError("a fixed and a random start are mutually singular")
        return self._log_ratio(other, x0, estimator)

    @abstractmethod
    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor: ...


class FixedStart(InitialLaw):
    """A known start ``(*batch, d)``."""

    fixed = True
    point: Tensor

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        check_ndim(point, tuple(range(1, 12)), "initial", "(d,) or (*batch, d)")
        if not point.is_floating_point():
            raise InvalidInputError(
                "a fixed start must be floating", got=point.dtype, hint="use initial.float()"
            )
        check_finite(point.detach(), "initial")
        self.dim = point.shape[-1]
        if isinstance(point, nn.Parameter):
            self.point = point
        else:
            self.register_buffer("point", point, persistent=False)

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See :meth:`InitialLaw.draw`."""
        return self.point.expand(*sample_shape, *self.point.shape)

    def log_prob(self, x0: Tensor) -> Tensor:
        """See :meth:`InitialLaw.log_prob`."""
        return x0.new_zeros(x0.shape[:-1])

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        theirs = other.point if isinstance(other, FixedStart) else self.point
        if not torch.equal(self.point.detach(), theirs.detach().to(self.point)):
            raise DiffusionMismatchError(
                "two different fixed starts are mutually singular",
                got=f"{self.point.tolist()} and {theirs.tolist()}",
            )
        return x0.new_zeros(x0.shape[:-1])


class DistributionStart(InitialLaw):
    """A start drawn from a torch or Pyro distribution with event ``(d,)``."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        super().__init__()
        if len(distribution.event_shape) != 1:
            raise ShapeError(
                "the initial law must have a vector event",
                got=f"event shape {tuple(distribution.event_shape)}",
                expected="(d,)",
                hint="use .to_event(1) or torch.distributions.Independent",
            )
        self.distribution = distribution
        self.dim = distribution.event_shape[0]

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See :meth:`InitialLaw.draw`."""
        sampler = self.distribution.rsample if self.distribution.has_rsample else self.distribution.sample
        if generator is None:
            return sampler(torch.Size(sample_shape))
        # torch distributions take no generator: lend them the global one, seeded from ours.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [] if generator.device.type == "cpu" else [generator.device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return sampler(torch.Size(sample_shape))

    def log_prob(self, x0: Tensor) -> Tensor:
        """See :meth:`InitialLaw.log_prob`."""
        return self.distribution.log_prob(x0)

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        if estimator == "rate" and isinstance(other, DistributionStart):
            try:
                kl = torch.distributions.kl_divergence(self.distribution, other.distribution)
                return kl.expand(x0.shape[:-1])
            except NotImplementedError:
                pass
        return self.log_prob(x0) - other.log_prob(x0)


class SimulatedMarginal(InitialLaw):
    """The law of a diffusion at a later time, drawn by simulating up to there; its density isn't known."""

    def __init__(self, measure: DiffusionMeasure, horizon: float, num_steps: int = 200) -> None:
        super().__init__()
        self.measure = measure
        self.horizon = horizon
        self.num_steps = num_steps
        self.dim = measure.initial.dim

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See :meth:`InitialLaw.draw`."""
        probe = self.measure.initial.draw((), generator)
        ts = torch.linspace(0, self.horizon, self.num_steps + 1, dtype=probe.dtype, device=probe.device)
        return self.measure.sample(ts, sample_shape, generator).x[..., -1, :]

    def log_prob(self, x0: Tensor) -> Tensor:
        """Raise: the density of a simulated marginal isn't known."""
        raise SingularDiffusionError(
            "the start has no known density: it is simulated",
            hint="give reverse(..., initial=...) the law at the horizon",
        )

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        return self.log_prob(x0)


def as_initial(initial: Any) -> InitialLaw:
    """Turn a distribution, a tensor or an :class:`InitialLaw` into an :class:`InitialLaw`."""
    if isinstance(initial, InitialLaw):
        return initial
    if isinstance(initial, Tensor):
        return FixedStart(initial)
    if isinstance(initial, torch.distributions.Distribution):
        return DistributionStart(initial)
    raise InvalidInputError(
        "initial must be a distribution or a tensor",
        got=type(initial).__name__,
        expected="event (d,) or a (d,) tensor",
    )
