"""Where samplers start: a law that was given, the standard normal, or the starts of the data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from stochdyn._checks import as_generator, check_type
from stochdyn.core.law.initial import DistributionStart, InitialLaw
from stochdyn.errors import ApproximationWarning, ShapeError, UnavailableError
from stochdyn.interpolants.fields.buffers import FlexibleBuffers

__all__ = ["EmpiricalStart", "Starts", "moved_law", "standard_normal"]

#: How many starts of the data are kept, and how many numbers they may hold.
_KEPT_ROWS, _KEPT_NUMBERS = 20_000, 2**23


def standard_normal(dim: int, like: Tensor | None = None) -> Distribution:
    """Return the standard normal on ``dim`` dimensions, in the precision and on the device of ``like``."""
    zeros = torch.zeros(dim) if like is None else like.new_zeros(dim)
    return Independent(Normal(zeros, torch.ones_like(zeros)), 1)


class Starts(FlexibleBuffers):
    r"""The law :math:`\rho_0` of a model, as it was stated: nothing is inferred from what the starts look like.

    It is ``base`` where that is given; else the standard normal where the path starts there by definition, or where training
    came without starts; else the law of the starts of the data, of which the first 20 000 are kept (fewer of large events) and
    drawn from. Their density, where one is asked for, is that of the Gaussian with their mean and covariance; a
    :class:`~stochdyn.errors.ApproximationWarning` says so where their fourth moments show that it can't be theirs.

    Args:
        base: A distribution with event ``(d,)``, or None.
        normal: Whether the path starts in the standard normal by definition.

    Raises:
        InvalidInputError: If ``base`` isn't a distribution.
        ShapeError: If its event isn't a vector.
    """

    flexible = ("kept", "example", "given")
    kept: Tensor
    example: Tensor
    given: Tensor

    def __init__(self, base: Any = None, normal: bool = False) -> None:
        super().__init__()
        if base is not None:
            check_type(base, Distribution, "base", "a distribution with event (d,)")
            if len(base.event_shape) != 1 or len(base.batch_shape):
                raise ShapeError(
                    "base must have a vector event and no batch",
                    got=f"batch {tuple(base.batch_shape)}, event {tuple(base.event_shape)}",
                    expected="event (d,)",
                    hint="use .to_event(1)",
                )
        self.base, self.normal = base, normal
        self.hold("kept", torch.zeros(0))
        self.hold("example", torch.zeros(0))
        # 0: nothing seen, 1: starts were drawn, 2: the data had starts
        self.hold("given", torch.zeros((), dtype=torch.long))
        self._done = False
        self._gaussian: Distribution | None = None

    def buffers_changed(self) -> None:
        """Forget what was derived from the starts."""
        self._done, self._gaussian = False, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Starts:
        """Move the given law with everything else."""
        super()._apply(fn, recurse)
        self._gaussian = None
        if self.base is not None:
            self.base = moved_law(self.base, fn)
        return self

    def observe(self, x0: Tensor, given: bool) -> None:
        """Note a batch of starts ``(n, d)``; ``given`` tells those of the data from those that were drawn here."""
        if self._done:
            return
        if self.example.numel() == 0:
            self.example = x0.new_zeros(x0.shape[-1])
        if self.base is not None or self.normal or not given:
            self._done = True
            if int(self.given) == 0:
                self.given = torch.ones_like(self.given)
            return
        self.given, self._gaussian = torch.full_like(self.given, 2), None
        most = max(1, min(_KEPT_ROWS, _KEPT_NUMBERS // x0.shape[-1]))
        rows = x0.detach()
        free = most - (self.kept.shape[0] if self.kept.ndim == 2 else 0)
        if free > 0:
            self.kept = (
                rows[:free].clone()
                if self.kept.ndim == 1
                else torch.cat([self.kept, rows[:free].to(self.kept)])
            )
        self._done = free <= rows.shape[0]

    @property
    def dim(self) -> int | None:
        """The dimension, or None as long as it isn't known."""
        if self.base is not None:
            return int(self.base.event_shape[0])
        return self.example.shape[-1] or None

    @property
    def empirical(self) -> bool:
        """Whether the law is that of the starts of the data, so that no density is known."""
        return self.base is None and not self.normal and int(self.given) == 2

    @property
    def is_normal(self) -> bool:
        """Whether the law is the standard normal by statement: no other was given, and the data brought no starts."""
        return self.base is None and not self.empirical

    def law(self, dim: int | None = None, like: Tensor | None = None) -> Distribution:
        """Return the law, with a density.

        Raises:
            UnavailableError: If it isn't known.
        """
        if self.base is not None:
            return self.base
        if self.empirical:
            if self._gaussian is None:
                self._gaussian = _gaussian_of(self.kept)
            return self._gaussian
        dim = self.dim if dim is None else dim
        if dim is None:
            raise UnavailableError("the law of the starts isn't known", hint="pass base=..., or train first")
        return standard_normal(dim, self.example if self.dim is not None else like)

    def draw(self, n: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Return ``n`` starts ``(n, d)``.

        Raises:
            UnavailableError: If nothing is known about them.
        """
        if self.empirical:
            source = as_generator(generator, self.kept.device)
            return self.kept[torch.randint(len(self.kept), (n,), generator=source, device=self.kept.device)]
        law = self.law()
        with torch.no_grad():
            return DistributionStart(law).draw((n,), as_generator(generator))


def _gaussian_of(x: Tensor) -> Distribution:
    """Return the Gaussian with the moments of points ``(n, d)``; independent components where there are too few of them."""
    n, d = x.shape
    mean = x.mean(0)
    scale = x.std(0) if n > 1 else torch.zeros_like(mean)
    if n <= 2 * d or not bool((scale > 0).all()):
        least = torch.finfo(x.dtype).eps ** 0.5 * scale.max().clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
        return Independent(Normal(mean, scale.clamp(min=float(least))), 1)
    law = torch.distributions.MultivariateNormal(mean, torch.cov(x.mT).reshape(d, d))
    white = torch.linalg.solve_triangular(law.scale_tril, (x - mean).mT, upper=False)
    expected = d * (d + 2)
    excess = float(white.double().square().sum(0).square().mean()) / expected - 1
    # five standard errors of the mean fourth power of the radius, and what matters beyond them
    if abs(excess) > 0.15 + 5 * (8 / (expected * n)) ** 0.5:
        warnings.warn(
            "the density of the starts is taken to be that of the Gaussian with the moments of the starts in the data, but they "
            f"aren't Gaussian (fourth moment {excess:+.0%}): state their law, InterpolantRegression(..., base=...)",
            ApproximationWarning,
            stacklevel=5,
        )
    return law


class EmpiricalStart(InitialLaw):
    """The law that gives each of some points the same weight; it has no density.

    Args:
        points: The points, ``(n, d)``, each of which has the same weight.
    """

    points: Tensor

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.dim = points.shape[-1]

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Draw points with replacement."""
        pick = torch.randint(len(self.points), sample_shape, generator=generator, device=self.points.device)
        return self.points[pick]

    def log_prob(self, x0: Tensor) -> Tensor:
        """Raise: points have no density.

        Raises:
            UnavailableError: If it is called at all.
        """
        raise UnavailableError(
            "the starts are those of the data, which have no density",
            hint="state their law: InterpolantRegression(..., base=...)",
        )

    def _log_ratio(self, other: InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        same = isinstance(other, EmpiricalStart) and torch.equal(self.points, other.points)
        return x0.new_zeros(x0.shape[:-1]) if same else self.log_prob(x0)


def moved_law(law: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a distribution with a function applied to all of its tensors."""
    new = copy.copy(law)
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            setattr(new, name, fn(value))
        elif isinstance(value, Distribution):
            setattr(new, name, moved_law(value, fn))
    return new
