"""Controls: changes of the law of an equation by a drift and a precision of its driving noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Control", "Field", "Rest", "plus"]

#: A function of time and state.
Field = Callable[[Tensor, Tensor], Any]
#: What a control adds to the affine part of the increments ``(*batch, m R)`` of step n, at time t and full state z.
Rest = Callable[[int, Tensor, Tensor], Tensor]


def plus(x: Tensor, slope: Tensor, dt: Tensor | float) -> Tensor:
    """Return ``x + slope dt``, in one kernel where the step is a number."""
    return x + slope * dt if isinstance(dt, Tensor) else torch.add(x, slope, alpha=dt)


class Control(nn.Module):
    r"""A change of law on the driving noise: :math:`dW = u\,dt + s\,dW'`.

    Args:
        drift: The drift ``u(t, z) -> (..., m)``, or None for no drift.
        precision: The extra precision of noise increments, :math:`\alpha(t, z)\ge 0` ``-> (..., m)``, or None. On a
            grid of step :math:`\Delta` the increments have the variance :math:`s^2\Delta` with
            :math:`s^2=1/(1+\alpha\Delta)`, which tends to 1 with the step, so the two laws stay equivalent in
            continuous time while the law on the grid can be matched exactly.

    ``z`` is the full state: ``x``, followed by the memory states of the noise where it has any, ``(..., d + m K)``.
    """

    def __init__(self, drift: Field | None = None, precision: Field | None = None) -> None:
        super().__init__()
        self.drift = drift
        self.precision = precision

    def shape_increment(
        self, n: int, t: Tensor, dt: Tensor | float, z: Tensor, e: Tensor, channels: int
    ) -> Tensor:
        """Turn the standard increments ``e (*batch, m R)`` of step ``n`` into those of the controlled law."""
        return self.tilt(*self.at(t, z), dt, e, channels)

    def affine(self, e: Tensor) -> tuple[Tensor, Tensor, Rest | None] | None:
        """Return the part of the increments that is affine in the state, and the rest; None if nothing is known of them.

        The controlled increments of step n are then ``shift[n] + z @ gain[n] + rest(n, t, z)``; a time loop needs no more of the
        control, and does the affine part of all steps beforehand.

        Args:
            e: The standard increments ``(N, *batch, m R)``.

        Returns:
            Shift ``(N, *batch, m R)``, gain ``(N, *batch, d + m K, m R)``, and the rest, None where there is none.
        """
        return None

    def at(self, t: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return drift and precision at ``t`` and the full state ``z``."""
        return (
            None if self.drift is None else self.drift(t, z),
            None if self.precision is None else self.precision(t, z),
        )

    @staticmethod
    def tilt(
        u: Tensor | None, precision: Tensor | None, dt: Tensor | float, e: Tensor, channels: int
    ) -> Tensor:
        """Turn standard increments into those of given drift and precision."""
        dw = e[..., :channels]
        if precision is not None:
            dw = dw * torch.rsqrt(1.0 + precision * dt)
        if u is not None:
            dw = plus(dw, u, dt)
        return dw if e.shape[-1] == channels else torch.cat([dw, e[..., channels:]], -1)

    def then(self, other: Control) -> Control:
        """Return the control that acts by this one and then by ``other``: drifts and precisions add."""
        return Control(_sum(self.drift, other.drift), _sum(self.precision, other.precision))


class _Sum(nn.Module):
    def __init__(self, first: Field, second: Field) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.first(t, z) + self.second(t, z)


def _sum(first: Field | None, second: Field | None) -> Field | None:
    if first is None:
        return second
    if second is None:
        return first
    return _Sum(first, second)
