"""How much noise a sampler adds: epsilon as a number, a schedule, or the one that minimises the path divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stochdyn._checks import DOUBLE, as_tensor, check_finite, check_ndim, check_real
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.paths.interpolant import Interpolant

__all__ = ["Epsilon", "TabulatedEpsilon", "as_epsilon"]

EpsilonLike = float | str | Tensor | Callable[[Tensor], Tensor]


class Epsilon(nn.Module):
    r"""The strength of the noise :math:`\sqrt{2\varepsilon(t)}\,dW` in the sampler of an interpolant.

    Any :math:`\varepsilon(t)\ge0` leaves the marginals of the exact model as they are; what changes is how errors of the
    networks are corrected on the way, and what the steps of the integrator cost.

    Args:
        value: A number, or a function of times of any shape.
        interpolant: The path.
        largest: The cap of a function, which may grow without bound towards an end.

    Raises:
        InvalidInputError: If the value is a negative number.
    """

    def __init__(
        self, value: float | Callable[[Tensor], Tensor], interpolant: Interpolant, largest: float = 1e6
    ) -> None:
        super().__init__()
        if not callable(value):
            check_real(value, "epsilon", minimum=0.0)
            value = float(value)
        check_real(largest, "largest", above=0.0)
        self._value, self.interpolant, self.largest = value, interpolant, float(largest)

    @property
    def vanishes(self) -> bool:
        """Whether there is no noise at all."""
        return self._value == 0.0

    @property
    def constant(self) -> float | None:
        """The value where it is the same number at all times, else None."""
        return None if callable(self._value) else self._value

    def forward(self, t: Tensor) -> Tensor:
        """Return epsilon at times of any shape."""
        if not callable(self._value):
            return torch.full_like(t, self._value)
        value = torch.as_tensor(self._value(t), dtype=t.dtype, device=t.device).expand(t.shape)
        return value.clamp(max=self.largest)

    def of_steps(self, ts: Tensor, max_rate: float) -> list[float]:
        r"""Return epsilon in every step of a grid, from its middle and held below ``max_rate`` times :math:`\gamma^2/h`.

        Raises:
            InvalidInputError: If epsilon is negative or NaN somewhere.
        """
        grid = ts.detach().double().cpu()
        middles, h = 0.5 * (grid[1:] + grid[:-1]), grid.diff().abs()
        with torch.no_grad():
            values = self(middles)
            bound = (
                max_rate * self.interpolant.noise.square(middles) / h if max_rate < float("inf") else values
            )
        if not bool((values >= 0).all()):
            raise InvalidInputError("epsilon must not be negative", got=f"minimum {float(values.min()):g}")
        return cast(list[float], torch.minimum(values, bound).tolist())


class TabulatedEpsilon(nn.Module):
    """Epsilon given at some times and interpolated linearly between.

    Args:
        times: The times, ``(T,)``, strictly increasing in [0, 1].
        values: The values of epsilon at these times, ``(T,)``, not negative.

    Raises:
        ShapeError: If the two don't fit together.
        InvalidInputError: If a value is negative.

    Example:
        >>> TabulatedEpsilon([0.0, 1.0], [0.0, 2.0])(torch.tensor(0.25))
        tensor(0.5000)
    """

    times: Tensor
    values: Tensor

    def __init__(self, times: Tensor | Sequence[float], values: Tensor | Sequence[float]) -> None:
        super().__init__()
        t, v = (
            as_tensor(x, name, like=DOUBLE).detach().double()
            for name, x in (("times", times), ("values", values))
        )
        check_ndim(t, 1, "times", "(T,)")
        if t.shape != v.shape or t.shape[0] < 2:
            raise ShapeError(
                "epsilon needs one value per time, at least two", got=f"{tuple(t.shape)} and {tuple(v.shape)}"
            )
        check_finite(v, "values")
        if bool((v < 0).any()):
            raise InvalidInputError("epsilon must not be negative", got=f"minimum {float(v.min()):g}")
        self.register_buffer("times", t)
        self.register_buffer("values", v)

    def forward(self, t: Tensor) -> Tensor:
        """Return epsilon at times of any shape."""
        s = t.detach().to(self.times).clamp(self.times[0], self.times[-1])
        right = torch.searchsorted(self.times, s.contiguous()).clamp(1, len(self.times) - 1)
        a, b = self.times[right - 1], self.times[right]
        share = (s - a) / (b - a)
        return ((1 - share) * self.values[right - 1] + share * self.values[right]).to(t)


def as_epsilon(value: EpsilonLike, interpolant: Interpolant) -> Epsilon:
    """Turn a number, a function of time or ``"optimal"`` into an :class:`Epsilon`.

    Args:
        value: What the user gave.
        interpolant: The path.

    Raises:
        InvalidInputError: If it is negative, another string, or ``"optimal"`` on a two-sided path.
    """
    if isinstance(value, Epsilon):
        return value
    if isinstance(value, str):
        if value != "optimal":
            raise InvalidInputError(
                "epsilon is unknown", got=repr(value), expected="a number, a function or 'optimal'"
            )
        interpolant.optimal_epsilon(0.5)
        # on one-sided paths it is unbounded at time 0
        return Epsilon(interpolant.optimal_epsilon, interpolant, 10.0)
    if isinstance(value, Tensor):
        if value.ndim:
            raise InvalidInputError(
                "epsilon must be one number or a function of time", got=f"shape {tuple(value.shape)}"
            )
        value = float(value)
    return Epsilon(value, interpolant)
