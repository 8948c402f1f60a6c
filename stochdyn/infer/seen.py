"""What sites and filters of an equation's observations have in common: its start, its grid through the times of data, its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_nonempty, check_points, check_type
from stochdyn.core.gaussian.exact_steps import exact_steps, takes_exact_steps
from stochdyn.core.gaussian.resolution import resolving_stops
from stochdyn.core.law.initial import DistributionStart, FixedStart, InitialLaw, as_initial
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time
from stochdyn.core.sde.solvers import batch_shape_of, draw_increments, integrate
from stochdyn.core.sde.stops import Stops, as_stops
from stochdyn.errors import SingularDiffusionError
from stochdyn.infer.distributions import start_of

__all__ = ["SeenEquation"]

# So many paths tell how steep the equation is.
_PILOTS = 16


@dataclass(frozen=True)
class SeenEquation:
    """An equation that is seen at given times.

    Attributes:
        sde: The equation.
        initial: The law of its start.
        stops: The grid of Euler steps through the times.
        probe: A start ``(*batch, d)`` of which shape and precision count.
        batch: The batch axes of start, equation and grid together.
    """

    sde: SDE
    initial: InitialLaw
    stops: Stops
    probe: Tensor
    batch: torch.Size

    @staticmethod
    def at(sde: SDE, initial: Any, ts: Any, start_time: Tensor | float, dt: float | None) -> SeenEquation:
        """Lay the grid, with steps of at most ``dt``; without it they are exact for an :class:`AffineField`, else resolve the equation.

        Raises:
            TimeGridError: If the times don't increase strictly, or begin before ``start_time``.
            ShapeError: If equation, start and grid don't fit each other.
        """
        check_type(sde, SDE, "sde")
        law = as_initial(initial)
        probe = start_of(law)
        check_points(probe, "initial", "a start (*batch, d)")
        check_nonempty(probe, "initial")
        stops = as_stops(ts, start_time, math.inf if dt is None else dt, probe)
        sde.check(first_time(stops.ts, probe), probe)
        batch = batch_shape_of(sde, probe, stops.ts)
        if dt is None and takes_exact_steps(sde, stops.ts, probe):
            try:
                return SeenEquation(exact_steps(sde, stops.ts), law, stops, probe, batch)
            except SingularDiffusionError:
                # Noise that doesn't reach every component leaves Euler steps.
                pass
        if dt is None:
            count = max(4, math.ceil(_PILOTS / max(1, batch.numel())))
            source = torch.Generator(probe.device).manual_seed(0)
            with torch.no_grad():
                starts = draw_start(law, (count, *batch), source)
            stops = resolving_stops(sde, starts, stops)
        return SeenEquation(sde, law, stops, probe, batch)

    @property
    def times(self) -> Tensor:
        """The times of the data, ``(T,)`` or ``(*batch, T)``."""
        return self.stops.ts[..., self.stops.index]

    def states(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the states ``(T, *shape, d)`` of independent paths at the times."""
        x0 = draw_start(self.initial, shape, None)
        dw, memory = draw_increments(self.sde, x0, self.stops.ts)
        return integrate(self.sde, x0, self.stops.ts, dw, memory).x[self.stops.index]


def draw_start(initial: InitialLaw, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return independent starts ``(*shape, d)``, whose last axes are those of the law of the start."""
    own = initial.batch_shape
    if isinstance(initial, FixedStart):
        return initial.point.expand(*shape, initial.dim)
    if isinstance(initial, DistributionStart) and own != shape:
        lead = len(shape) - len(own)
        return DistributionStart(initial.distribution.expand(shape[lead:])).draw(shape[:lead], generator)
    return initial.draw(shape, generator)
