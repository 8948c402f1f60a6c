"""Schedules: the time-dependent coefficients of an interpolant, with the derivatives that its formulas need."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn._checks import of_times
from stochdyn._transforms import recording
from stochdyn.core.forward.divergences import attach, pull_back, release
from stochdyn.errors import InvalidInputError

__all__ = [
    "Constant",
    "Cosine",
    "CosineSquared",
    "CustomSchedule",
    "Linear",
    "Remaining",
    "Schedule",
    "Sine",
    "VariancePreserving",
    "as_schedule",
]

TimeFunction = Callable[[Tensor], Tensor]


class Schedule(nn.Module, ABC):
    r"""A function of time on [0, 1] with what the formulas of interpolants need of it.

    Subclasses give :meth:`value` and :meth:`derivative`. Schedules whose derivative isn't finite at an end,
    such as :math:`\sqrt{t(1-t)}`, also give :meth:`square_derivative`, which is.

    Example:
        >>> Linear().value(torch.tensor(0.25)), Linear().derivative(torch.tensor(0.25))
        (tensor(0.2500), tensor(1.))
    """

    #: Whether the value is zero at all times.
    is_zero = False

    @abstractmethod
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time; it may be infinite at 0 and 1."""

    @of_times
    def square(self, t: Tensor) -> Tensor:
        """Return the square of the value."""
        return self.value(t).square()

    @of_times
    def square_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of the square, finite on the whole of [0, 1]."""
        return 2 * self.value(t) * self.derivative(t)

    def forward(self, t: Tensor | float) -> Tensor:
        """Return the value; a number stands for a tensor of torch's default precision."""
        return self.value(t if isinstance(t, Tensor) else torch.tensor(float(t)))


class Constant(Schedule):
    """The same number at all times.

    Args:
        number: The value of the schedule at all times.

    Example:
        >>> Constant(0.0).value(torch.tensor([0.1, 0.9]))
        tensor([0., 0.])
    """

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = float(number)
        self.is_zero = self.number == 0.0

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return torch.full_like(t, self.number)

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return torch.zeros_like(t)


class Linear(Schedule):
    r"""The share of the data on straight paths, :math:`t`."""

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return t

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return torch.ones_like(t)


class Remaining(Schedule):
    r"""What is left of the start on straight paths, :math:`1-t`."""

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return 1 - t

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return -torch.ones_like(t)


class _Trigonometric(Schedule, ABC):
    r"""A quarter wave :math:`w(t)`, shortened to :math:`\sqrt{1-\gamma^2}\,w` where there is a latent."""

    def __init__(self, gamma: Schedule | None = None) -> None:
        super().__init__()
        self.gamma = None if gamma is None or gamma.is_zero else gamma
        if self.gamma is not None:
            times = torch.linspace(0, 1, 201, dtype=torch.float64)
            largest = float(self.gamma.square(times).detach().max())
            if largest >= 1:
                raise InvalidInputError(
                    "a trigonometric path needs a latent below 1", got=f"gamma up to {largest**0.5:g}"
                )

    @abstractmethod
    def wave(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the wave and its derivative."""

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        wave = self.wave(t)[0]
        return wave if self.gamma is None else wave * (1 - self.gamma.square(t)).sqrt()

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        wave, slope = self.wave(t)
        if self.gamma is None:
            return slope
        length = (1 - self.gamma.square(t)).sqrt()
        return slope * length - wave * self.gamma.square_derivative(t) / (2 * length)


class Cosine(_Trigonometric):
    r"""What is left of the start on a quarter circle, :math:`\sqrt{1-\gamma^2}\,\cos(\pi t/2)`.

    With :class:`Sine` it keeps the variance of standardised, independent ends, so that a network sees one scale at all times.

    Args:
        gamma: The schedule of the latent, which leaves less to the two ends; None for none.

    Raises:
        InvalidInputError: If gamma reaches 1.
    """

    def wave(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and derivative; the cosine of a quarter turn is zero exactly."""
        half = 0.5 * math.pi
        # sin(pi/2 (1 - t)) is exact at t = 1, where cos(pi/2 t) leaves a rounding error.
        return torch.sin(half * (1 - t)), -half * torch.sin(half * t)


class Sine(_Trigonometric):
    r"""The share of the data on a quarter circle, :math:`\sqrt{1-\gamma^2}\,\sin(\pi t/2)`, beside :class:`Cosine`.

    Args:
        gamma: The schedule of the latent, which leaves less to the two ends; None for none.

    Raises:
        InvalidInputError: If gamma reaches 1.
    """

    def wave(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sine and derivative."""
        half = 0.5 * math.pi
        return torch.sin(half * t), half * torch.sin(half * (1 - t))


class CosineSquared(Schedule):
    r""":math:`\cos^2(\pi t)` on one half of [0, 1] and zero on the other: for paths that pass through pure noise half-way.

    Args:
        first_half: Whether the schedule belongs to the start, which is gone after the first half of the time; else to the data.
    """

    def __init__(self, first_half: bool) -> None:
        super().__init__()
        self.first_half = first_half

    def _here(self, t: Tensor) -> Tensor:
        return t < 0.5 if self.first_half else t > 0.5

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return torch.where(self._here(t), torch.cos(math.pi * t).square(), torch.zeros_like(t))

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        slope = -math.pi * torch.sin(2 * math.pi * t)
        return torch.where(self._here(t), slope, torch.zeros_like(t))


class VariancePreserving(Schedule):
    r""":math:`\sqrt{1-t^2}`, beside :math:`t` the interpolant of an Ornstein-Uhlenbeck process on the clock :math:`t=e^{-\tau}`."""

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return ((1 - t) * (1 + t)).sqrt()

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        return -t / self.value(t)

    @of_times
    def square(self, t: Tensor) -> Tensor:
        """Return the square of the value."""
        return (1 - t) * (1 + t)

    @of_times
    def square_derivative(self, t: Tensor) -> Tensor:
        """Return the derivative of the square, which is finite where that of the value isn't."""
        return -2 * t


class CustomSchedule(Schedule):
    """A user's function of time, for what no ready-made schedule does.

    Args:
        function: A callable or a module that maps times of any shape to values of the same shape.
        derivative: The derivative in the same form; found by automatic differentiation if None.

    Raises:
        InvalidInputError: If an argument isn't callable.

    Example:
        >>> CustomSchedule(lambda t: t**2).derivative(torch.tensor([0.5]))
        tensor([1.])
    """

    def __init__(self, function: TimeFunction, derivative: TimeFunction | None = None) -> None:
        super().__init__()
        for name, value in (("function", function), ("derivative", derivative)):
            if value is not None and not callable(value):
                raise InvalidInputError(f"{name} must be callable", got=type(value).__name__)
        self.function = function
        self.slope = derivative

    @of_times
    def value(self, t: Tensor) -> Tensor:
        """Return the value at times of any shape."""
        return self.function(t)

    @of_times
    def derivative(self, t: Tensor) -> Tensor:
        """Return the derivative in time."""
        if self.slope is not None:
            return self.slope(t)
        keep = torch.is_grad_enabled()
        with recording():
            s = attach(t)
            slope = pull_back(self.function(s), s, create_graph=keep)
        return release(slope, keep, (t, s))


def as_schedule(value: Schedule | TimeFunction | float, name: str) -> Schedule:
    """Turn a number or a function into a :class:`Schedule`.

    Raises:
        InvalidInputError: If it is neither.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, int | float):
        return Constant(value)
    if callable(value):
        return CustomSchedule(value)
    raise InvalidInputError(
        f"{name} must be a Schedule, a function of time or a number", got=type(value).__name__
    )
