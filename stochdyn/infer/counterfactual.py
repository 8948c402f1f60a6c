"""Posterior draws of a path under an intervention: the noise that drove each draw, in an equation that is another one from a time on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.core.sde.intervention import Intervention
from stochdyn.errors import TimeGridError, UnavailableError

if TYPE_CHECKING:
    from stochdyn.infer.path_law import DrawnPaths

__all__ = ["CounterfactualDraws", "intervened_draws"]


@dataclass(frozen=True)
class CounterfactualDraws:
    """Draws of a path before and after an intervention.

    Attributes:
        before: The draws as they are, with the time of the intervention on their grid.
        after: The same noise in the equation that holds from the intervention on.
        time: The time of the intervention.
    """

    before: DrawnPaths
    after: DrawnPaths
    time: Tensor

    @property
    def ts(self) -> Tensor:
        """The grid."""
        return self.before.ts

    @property
    def num_batch(self) -> int:
        """The number of batch axes that the path has in the model."""
        return self.before.num_batch

    def at(self, ts: Tensor) -> Tensor:
        """Return the paths ``(T', S, *batch, d)`` at other times, none before the fitted grid."""
        before, after = self.before.at(ts), self.after.at(ts)
        return torch.where(time_column(ts, before) < self.time.to(before), before, after)


def intervened_draws(drawn: DrawnPaths, intervention: Intervention) -> CounterfactualDraws:
    r"""Return what the same noise does under an intervention.

    Increments are read off the draws, :math:`\Delta W_n=G^+(x_{n+1}-x_n-f\,\Delta_n)`, and drive the new equation from the state at
    the time of the intervention: abduction, action and prediction.

    Args:
        drawn: The draws.
        intervention: What is done, and from when on.

    Raises:
        UnavailableError: If the noise has memory, or paths aren't made by Euler steps.
        TimeGridError: If the intervention begins before the path.

    Reference:
        Pearl, "Causality", 2009, section 7.1.
    """
    if drawn.sde.noise.num_states or drawn.method.name != "euler":
        raise UnavailableError(
            "the noise of a path is read off its draws for Euler steps of a Brownian motion"
        )
    time = intervention.time(drawn.ts)
    if bool((time < drawn.ts[..., 0]).any()):
        raise TimeGridError(
            "the intervention begins before the path",
            got=f"start_time={float(time):g}",
            expected=f"at least {float(drawn.ts[..., 0].max()):g}",
        )
    grid, x = drawn.through(time)
    after = intervention.equation(drawn.sde)
    t, dt = time_column(grid, x), steps_of(grid, x)
    begun = t >= time.to(x)
    dw = drawn.sde.diffusion(t[:-1], x[:-1]).solve(x[1:] - x[:-1] - drawn.sde.slope(t[:-1], x[:-1]) * dt)
    state = torch.where(begun[0], intervention.set(x[0]), x[0])
    states = [state]
    for n in range(len(dw)):
        # Before it the draw as it is, at its time the held values, and from there on the noise in the new equation.
        step = state + after.slope(t[n], state) * dt[n] + after.diffusion(t[n], state).apply(dw[n])
        held = torch.where(begun[n + 1], intervention.set(x[n + 1]), x[n + 1])
        state = torch.where(begun[n], step, held)
        states.append(state)
    moved = torch.stack(states)
    return CounterfactualDraws(drawn.on(grid, x), drawn.on(grid, moved, after), time)
