"""Initial laws: a distribution, a fixed point, or the simulated marginal of another law."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_generator, as_tensor, check_finite, check_ndim
from stochdyn._lending import lent
from stochdyn.core.law.marginals import GaussianMarginal, Marginal, SampledMarginal
from stochdyn.core.law.template import Template
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError, SingularDiffusionError

if TYPE_CHECKING:
    from stochdyn.core.law.diffusion import DiffusionMeasure

__all__ = [
    "DistributionStart",
    "FixedStart",
    "InitialLaw",
    "ReflectedStart",
    "SimulatedMarginal",
    "as_initial",
]


class InitialLaw(nn.Module, ABC):
    """The law of the first grid point, a vector of ``dim`` components."""

    dim: int
    #: Whether the start is one known point, which then is no part of the event.
    fixed = False

    @abstractmethod
    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the starts."""
        return torch.Size(())

    def like(self) -> Tensor:
        """Return a tensor of the precision and on the device of the starts."""
        return next(iter((*self.parameters(), *self.buffers())), torch.empty(0))

    def marginal(self) -> Marginal:
        """Return the law of the start as a marginal."""
        return _StartMarginal(self)

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


class _StartMarginal(SampledMarginal):
    """The law of a start, with its density."""

    def __init__(self, initial: InitialLaw) -> None:
        super().__init__(
            lambda shape, source: initial.draw(shape, as_generator(source, initial.like().device))
        )
        self.initial = initial

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``."""
        return self.initial.log_prob(x)


class FixedStart(InitialLaw):
    """A known start ``(*batch, d)``.

    Use it where the start was seen or chosen.
    """

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
            # A copy, so that loading a state doesn't write into the user's tensor.
            self.register_buffer("point", point if point.requires_grad else point.detach().clone())

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the starts, ``()`` for one law."""
        return self.point.shape[:-1]

    def marginal(self) -> Marginal:
        """Return the law of the start as a marginal."""
        return GaussianMarginal(self.point, self.point.new_zeros(*self.point.shape, self.dim))

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""
        return self.point.expand(*sample_shape, *self.point.shape)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Return the log density at ``x0 (..., d)``; zero for a fixed start, which is no part of the event."""
        return x0.new_zeros(x0.shape[:-1])

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        theirs = other.point if isinstance(other, FixedStart) else self.point
        if not _equal(self.point.detach(), theirs.detach().to(self.point)):
            raise DiffusionMismatchError(
                "two different fixed starts are mutually singular",
                got=f"{self.point.tolist()} and {theirs.tolist()}",
            )
        return x0.new_zeros(x0.shape[:-1])


class DistributionStart(InitialLaw):
    """A start drawn from a torch or Pyro distribution with event ``(d,)``.

    The tensors that define the distribution become part of this module: parameters are learnt, the others move with it and
    are saved with it. What a distribution is given as the *result* of a computation (``log_scale.exp()``) is computed once, before
    any learning; give a function that returns the distribution, or a module, to have it computed at every use.

    Use it where the start is uncertain; parameters of the distribution are learnt with the rest.

    Args:
        distribution: The distribution, or a function (a module, for one) without arguments that returns it.
    """

    def __init__(self, distribution: Any) -> None:
        super().__init__()
        if isinstance(distribution, torch.distributions.Distribution):
            self._template: Template | None = Template(distribution)
            for name, value in list(self._template.tensors.items()):
                if isinstance(value, nn.Parameter):
                    self.register_parameter(name, value)
                else:
                    self.register_buffer(name, value if value.requires_grad else value.detach().clone())
            self._template.release()
        else:
            self._template, self.recipe = None, distribution
        law = self.distribution
        if not isinstance(law, torch.distributions.Distribution):
            raise InvalidInputError("initial() must return a distribution", got=type(law).__name__)
        if len(law.event_shape) != 1:
            raise ShapeError(
                "the initial law must have a vector event",
                got=f"event shape {tuple(law.event_shape)}",
                expected="(d,)",
                hint="use .to_event(1) or torch.distributions.Independent",
            )
        self.dim = law.event_shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> DistributionStart:
        super()._apply(fn, recurse)
        if self._template is not None:
            self._template.move(fn)
        return self

    @property
    def distribution(self) -> torch.distributions.Distribution:
        """The distribution of the start, of the tensors as they are now."""
        if self._template is None:
            return self.recipe()
        return self._template.filled({name: getattr(self, name) for name in self._template.names})

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the starts, ``()`` for one law."""
        return self.distribution.batch_shape

    def like(self) -> Tensor:
        """Return a tensor of the precision and on the device of the starts."""
        return super().like() if self._template is not None else self.distribution.mean.detach()

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""
        law = self.distribution
        sampler = law.rsample if law.has_rsample else law.sample
        if generator is None:
            return sampler(torch.Size(sample_shape))
        # torch distributions take no generator: lend them the global one, seeded from ours.
        with lent(generator):
            return sampler(torch.Size(sample_shape))

    def log_prob(self, x0: Tensor) -> Tensor:
        """Return the log density at ``x0 (..., d)``; zero for a fixed start, which is no part of the event."""
        return self.distribution.log_prob(x0)

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        if estimator == "rate" and isinstance(other, DistributionStart):
            try:
                kl = torch.distributions.kl_divergence(self.distribution, other.distribution)
                return kl.expand(x0.shape[:-1])
            except NotImplementedError:
                pass
        return self.log_prob(x0) - other.log_prob(x0)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two points are the same up to repetition along batch axes."""
    try:
        return bool((a == b).all())
    except RuntimeError:
        return False


class SimulatedMarginal(InitialLaw):
    """The law of a diffusion at a later time, drawn by simulating up to there; its density isn't known.

    Use it as the start of a time-reversed law, whose end is where the forward law began.
    """

    def __init__(self, measure: DiffusionMeasure, horizon: Tensor | float) -> None:
        super().__init__()
        self.measure = measure
        self.horizon = horizon
        self.dim = measure.initial.dim

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the starts, ``()`` for one law."""
        return self.measure.initial.batch_shape

    def like(self) -> Tensor:
        """Return a tensor of the precision and on the device of the starts."""
        return self.measure.initial.like()

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""
        return self.measure.marginal(self.horizon).sample(sample_shape, generator)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Raise: the density of a simulated marginal isn't known."""
        raise SingularDiffusionError(
            "the start has no known density: it is simulated",
            hint="give reverse(..., initial=...) the law at the horizon",
        )

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        return self.log_prob(x0)


class ReflectedStart(InitialLaw):
    """Another start with the signs of some components changed."""

    signs: Tensor

    def __init__(self, start: InitialLaw, signs: Tensor) -> None:
        super().__init__()
        self.start, self.dim, self.fixed = start, start.dim, start.fixed
        self.register_buffer("signs", signs.detach().clone())

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the starts, ``()`` for one law."""
        return self.start.batch_shape

    def like(self) -> Tensor:
        """Return a tensor of the precision and on the device of the starts."""
        return self.start.like()

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Return starts ``(*sample, *batch, d)``, differentiable where the law is."""
        x0 = self.start.draw(sample_shape, generator)
        return x0 * self.signs.to(x0)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Return the log density at ``x0 (..., d)``; zero for a fixed start, which is no part of the event."""
        return self.start.log_prob(x0 * self.signs.to(x0))

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        if isinstance(other, ReflectedStart) and torch.equal(self.signs, other.signs):
            return self.start.log_ratio(other.start, x0 * self.signs.to(x0), estimator)
        if self.fixed:
            points = (self.draw((), None), other.draw((), None))
            return FixedStart(points[0]).log_ratio(FixedStart(points[1]), x0, estimator)
        return self.log_prob(x0) - other.log_prob(x0)


def as_initial(initial: Any) -> InitialLaw:
    """Turn a distribution, a function that returns one, a point of any kind or an :class:`InitialLaw` into an :class:`InitialLaw`."""
    if isinstance(initial, InitialLaw):
        return initial
    if isinstance(initial, Tensor):
        return FixedStart(initial)
    if isinstance(initial, torch.distributions.Distribution):
        return DistributionStart(initial)
    if not isinstance(initial, numbers.Number | str | type) and callable(initial):
        return DistributionStart(initial)
    if isinstance(initial, Sequence) or hasattr(initial, "__array__"):
        return FixedStart(as_tensor(initial, "initial"))
    raise InvalidInputError(
        "initial must be a distribution or a tensor",
        got=type(initial).__name__,
        expected="event (d,) or a (d,) tensor",
    )
