"""Heun's method for the parameters of a state, with steps controlled in the metric of the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stochdyn.povm.dynamics.tdvp import Velocity

__all__ = ["HeunStep", "controlled_step", "plain_step"]

Field = Callable[[float, Tensor], Velocity]

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 2.0
_MAX_REJECTIONS = 20
_FIRST = 0.05


@dataclass(frozen=True)
class HeunStep:
    """What a step did.

    Attributes:
        parameters: The parameters ``(P,)`` after the step.
        taken: The length of the step.
        proposed: The length that the next step should try.
        error: The estimated error of the step in the Fisher metric, or None where it isn't controlled.
        start: The velocity at the start of the step.
        evaluations: The number of velocities that were computed.
    """

    parameters: Tensor
    taken: float
    proposed: float
    error: float | None
    start: Velocity
    evaluations: int


def plain_step(field: Field, t: float, y: Tensor, step: float) -> HeunStep:
    r"""Take one step of fixed length.

    .. math:: y_{n+1} = y_n + \tfrac h2\bigl(f(t_n,y_n) + f(t_n+h,\,y_n+hf(t_n,y_n))\bigr)
    """
    first = field(t, y)
    second = field(t + step, y + step * first.direction)
    after = y + 0.5 * step * (first.direction + second.direction)
    return HeunStep(after, step, step, None, first, 2)


def controlled_step(
    field: Field, t: float, y: Tensor, step: float | None, longest: float, tolerance: float
) -> HeunStep:
    """Take one step whose error, from a comparison with two half steps, stays below a tolerance.

    The error is measured in the Fisher metric, so it counts the change of the law, whatever the parameters; half its
    square is a Kullback-Leibler divergence. The half steps are what is kept.

    Args:
        field: A function ``field(t, y)`` that gives the velocity.
        t: The time at the start of the step.
        y: The parameters ``(P,)`` at the start of the step.
        step: The length to try; None takes one that changes the law by a twentieth.
        longest: The length not to exceed, up to the next output time, say.
        tolerance: The largest error of a step in the Fisher metric.

    Reference:
        Reh, Schmitt and Gärttner, Phys. Rev. Lett. 127, 230501 (2021), supplement.
    """
    first = field(t, y)
    count = 1
    if step is None:
        # sqrt(E l^2) h is how far the law moves in the Fisher metric
        step = _FIRST / first.rate_norm if first.rate_norm * longest > _FIRST else longest
    for _ in range(_MAX_REJECTIONS):
        h = min(step, longest)
        # one step of length h, and two of length h/2 from the same velocity at the start
        whole = y + 0.5 * h * (first.direction + field(t + h, y + h * first.direction).direction)
        middle = field(t + h / 2, y + 0.5 * h * first.direction)
        half = y + 0.25 * h * (first.direction + middle.direction)
        third = field(t + h / 2, half)
        fourth = field(t + h, half + 0.5 * h * third.direction)
        after = half + 0.25 * h * (third.direction + fourth.direction)
        count += 4
        error = float(first.metric.norm(after - whole))
        # the local error goes with h^3, so a step that just meets the tolerance is (tolerance/error)^(1/3) as
        # long
        factor = _GROW if error == 0 else _SAFETY * (tolerance / error) ** (1 / 3)
        proposed = h * min(max(factor, _SHRINK), _GROW)
        if error <= tolerance:
            # a step cut short by the next time asked for says nothing against the longer one
            return HeunStep(after, h, max(proposed, step if h < step else 0.0), error, first, count)
        step = proposed
    return HeunStep(after, h, step, error, first, count)
