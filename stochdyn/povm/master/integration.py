"""The one driver of ordinary differential equations of the exact methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stochdyn.errors import InvalidInputError
from stochdyn.povm.master.schedule import Schedule, check_finite_rates

__all__ = ["integrate"]

_MAX_STEPS = 200_000


def integrate(
    change: Callable[[float, np.ndarray], np.ndarray],
    start: np.ndarray,
    schedule: Schedule,
    visit: Callable[[int, np.ndarray], None],
    *,
    rtol: float,
    atol: float,
) -> None:
    r"""Integrate :math:`\dot y=f(t,y)` and visit the solution at every output time.

    A Runge-Kutta method of order eight that starts anew at every output time and at every break of the coefficients,
    and never evaluates ``f`` beyond the segment it is on. Time is measured in units of the whole span, so nothing
    depends on the unit in which it was given.

    Args:
        change: The function ``f(t, y)`` of a time and a vector.
        start: The vector at the first output time, real or complex.
        schedule: The output times and the breaks of the coefficients.
        visit: A function that is called with the index of each output time and the vector there.
        rtol: The relative tolerance of a step.
        atol: The absolute tolerance of a step.

    Raises:
        InvalidInputError: If the equation can't be solved to the tolerance, or needs over 200 000 steps.

    Reference:
        Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I (1993), section II.10.
    """
    from scipy.integrate import DOP853

    visit(0, start)
    first, span = schedule.ts[0], schedule.span
    y, taken = start, 0
    for segment in schedule.segments:
        low, high = segment.start, segment.end
        begin, end = (low - first) / span, (high - first) / span
        if end > begin:

            def scaled(s: float, y: np.ndarray, low: float = low, high: float = high) -> np.ndarray:
                t = min(max(first + s * span, low), high)
                rate = span * change(t, y)
                check_finite_rates(rate, t)
                return rate

            longest = schedule.longest(low) / span
            solver = DOP853(scaled, begin, y, end, rtol=rtol, atol=atol, max_step=longest)
            while solver.status == "running":
                solver.max_step = schedule.longest(first + solver.t * span) / span
                message = solver.step()
                taken += 1
                if solver.status == "failed" or taken > _MAX_STEPS:
                    raise InvalidInputError(
                        "the integration failed",
                        got=message or f"over {_MAX_STEPS} steps",
                        hint="ask for fewer periods of the fastest term, or a larger rtol",
                    )
            y = solver.y
        if segment.output is not None:
            visit(segment.output, y)
