"""The grid of Euler steps through times of data, and each step as the transition of a Markov chain in the full state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from stochdyn._checks import as_time_grid, check_positive
from stochdyn.core.sde.coefficients import Diagonal, Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time, remembered
from stochdyn.core.sde.solvers import increment_scale, step_everywhere
from stochdyn.errors import ShapeError, TimeGridError, UnavailableError

__all__ = ["EulerTransitions", "Stops", "as_stops"]


@dataclass(frozen=True)
class Stops:
    """A grid of steps from the start of a law through the times of data.

    Attributes:
        ts: The grid ``(G,)``, or ``(*batch, G)`` where every series has its own; there some steps may be empty, so that all
            series need the same number of steps to each of their times.
        counts: The number of steps that lead to each time; the first is 0 where data begin at the start.
    """

    ts: Tensor
    counts: tuple[int, ...]

    @property
    def index(self) -> Tensor:
        """Where the times of data stand in the grid, ``(T,)``."""
        return torch.tensor(self.counts, device=self.ts.device).cumsum(0)

    def divided(self, counts: list[int]) -> Stops:
        """Return the grid with each of its steps divided into equal parts, the same number in all series.

        Args:
            counts: The number of parts of each step ``(G - 1,)``.
        """
        pieces = [self.ts[..., :1]]
        for n, count in enumerate(counts):
            left, right = self.ts[..., n : n + 1], self.ts[..., n + 1 : n + 2]
            share = torch.arange(1, count, device=self.ts.device).to(self.ts.dtype) / count
            pieces += [left + share * (right - left), right]
        steps = iter(counts)
        return Stops(torch.cat(pieces, -1), tuple(sum(next(steps) for _ in range(n)) for n in self.counts))


def as_stops(times: object, start_time: Tensor | float, dt: float, like: Tensor) -> Stops:
    """Return the grid that starts at ``start_time`` and goes through ``times`` in equal steps of at most ``dt`` between them.

    Args:
        times: The times of data, ``(T,)`` or ``(*batch, T)``.
        start_time: The time at which the law starts, or one per series ``(*batch,)``.
        dt: The longest step; infinity takes one step to each time.
        like: A tensor whose precision and device data without their own take.

    Raises:
        TimeGridError: If the times don't increase strictly, or begin before the law does.
    """
    grid = as_time_grid(times, "times", 1, like=like, batch=True)
    if dt != math.inf:
        check_positive(dt, "dt")
    begin = torch.as_tensor(start_time, dtype=grid.dtype, device=grid.device)
    if begin.ndim:
        try:
            grid = grid.expand(*torch.broadcast_shapes(begin.shape, grid.shape[:-1]), grid.shape[-1])
        except RuntimeError as error:
            raise ShapeError(
                "start_time must be one time, or one per series",
                got=tuple(begin.shape),
                expected=tuple(grid.shape[:-1]),
            ) from error
        return _divide(grid, begin, dt)
    return remembered(grid, ("stops", float(begin), dt), lambda: _divide(grid, begin, dt))


def _divide(grid: Tensor, begin: Tensor, dt: float) -> Stops:
    knots = torch.cat([begin.expand(grid.shape[:-1]).unsqueeze(-1), grid], -1)
    gaps = (knots[..., 1:] - knots[..., :-1]).detach()
    # Differences of large times carry rounding errors, which must not cost a step.
    slack = 8 * torch.finfo(knots.dtype).eps * knots.detach().abs().amax()
    early = gaps[..., 0] < -slack
    if bool(early.any()):
        raise TimeGridError(
            "times begin before the law does",
            got=f"{float(grid[..., 0].min()):g}",
            expected=f"at least start_time={float(begin.max()):g}",
        )
    steps = ((gaps - slack) / dt).ceil().clamp_min(1.0)
    steps[..., 0] = torch.where(gaps[..., 0] <= slack, torch.zeros_like(steps[..., 0]), steps[..., 0])
    counts = tuple(int(n) for n in steps.reshape(-1, steps.shape[-1]).amax(0).tolist())
    if max(counts) == 1:
        return Stops(knots if counts[0] else grid, counts)
    pieces = [knots[..., :1] if counts[0] else grid[..., :1]]
    for k, count in enumerate(counts):
        if not count:
            continue
        own = steps[..., k : k + 1].clamp_min(1.0)
        share = (torch.arange(1, count + 1, device=grid.device).to(grid.dtype) / own).clamp_max(1.0)
        left, right = knots[..., k : k + 1], knots[..., k + 1 : k + 2]
        # A series that needs fewer steps stands still at the end of the interval.
        pieces.append(torch.where(share < 1.0, left + share * (right - left), right))
    return Stops(torch.cat(pieces, -1), counts)


class EulerTransitions:
    r"""The Euler steps of an equation as a Markov chain in the full state ``z``: the path, then the memory of its noise.

    .. math:: z_{n+1}=m_n(z_n)+B_n(z_n)\epsilon_n,\qquad\epsilon_n\sim N(0,I).

    Args:
        sde: The equation, with its control.
        stops: The grid.
        x0: The starts ``(*batch, d)``, of which shape and precision count.
    """

    def __init__(self, sde: SDE, stops: Stops, x0: Tensor) -> None:
        self.sde, self.stops, self.dim = sde, stops, x0.shape[-1]
        ts = stops.ts
        self.channels = sde.noise_dim(first_time(ts, x0), x0)
        self.num_states = sde.noise.num_states
        self.size = self.dim + self.channels * self.num_states
        self.num_steps = ts.shape[-1] - 1
        self._ends = (0, *accumulate(stops.counts))
        plain = not self.num_states and sde.control is None
        if self.num_states and ts.ndim > 1 and bool((ts[..., 1:] <= ts[..., :-1]).any()):
            raise UnavailableError(
                "noise with memory takes no empty steps: give no dt, or data with NaN on finer grids"
            )
        self.plain = plain
        whole = ts.to(x0.dtype)
        self._times = (whole if ts.ndim == 1 else whole.movedim(-1, 0).unsqueeze(-1)).unbind(0)
        gaps = (ts[..., 1:] - ts[..., :-1]).to(x0.dtype)
        self._dt = (gaps if ts.ndim == 1 else gaps.movedim(-1, 0).unsqueeze(-1)).unbind(0)
        self._constant = None if sde.state_dependent else sde.diffusion(self._times[0], x0)
        self._roots: tuple[Tensor, ...] | None = None
        if not plain and self.num_steps:
            self._scale = increment_scale(sde, ts, self.channels, x0.dtype)

    def span(self, step: int) -> range:
        """Return the steps of the grid that lead to observation ``step``."""
        return range(self._ends[step], self._ends[step + 1])

    def mean(self, n: int, z: Tensor) -> Tensor:
        """Return the mean ``(..., Z)`` of the state after step ``n``, given ``z (..., Z)`` before it."""
        if self.plain:
            return z + self.sde.drift(self._times[n], z) * self._dt[n]
        return self._push(n, z, z.new_zeros(*z.shape[:-1], self._scale.shape[-1]))

    def load(self, n: int, z: Tensor) -> Tensor:
        """Return ``B (..., Z, M)`` of step ``n``; batch axes that the noise doesn't depend on may be missing."""
        if self.plain:
            g = self._constant if self._constant is not None else self.sde.diffusion(self._times[n], z)
            root = self._dt[n].sqrt()
            return g.matrix(self.dim).to(z.dtype) * (root if root.ndim == 0 else root.unsqueeze(-1))
        # The step is affine in the increments: its columns are the images of the basis vectors.
        scale = self._scale[n]
        units = torch.diag_embed(scale) if scale.ndim == 1 else torch.diag_embed(scale).movedim(-2, 0)
        lead = (1,) * (z.ndim - 1 - (units.ndim - 2))
        units = units.reshape(units.shape[0], *lead, *units.shape[1:]).expand(-1, *z.shape[:-1], -1)
        columns = self._push(n, z.unsqueeze(0).expand(units.shape[0], *z.shape), units)
        return (columns - self.mean(n, z)).movedim(0, -1)

    def push(self, n: int, z: Tensor, normal: Tensor) -> Tensor:
        """Return the states ``(..., Z)`` after step ``n`` that standard normals ``(..., M)`` drive."""
        if not self.plain:
            return self._push(n, z, normal * self._scale[n])
        mean = torch.addcmul(z, self.sde.drift(self._times[n], z), self._dt[n])
        if isinstance(self._constant, Scalar | Diagonal):
            if self._roots is None:
                self._roots = self._deviations(self._constant)
            return torch.addcmul(mean, normal, self._roots[n])
        g = self._constant if self._constant is not None else self.sde.diffusion(self._times[n], z)
        return mean + g.apply(normal * self._dt[n].sqrt())

    def _deviations(self, g: Scalar | Diagonal) -> tuple[Tensor, ...]:
        """Return the standard deviations of all steps where every component has constant noise of its own."""
        strength = g.value.unsqueeze(-1) if isinstance(g, Scalar) and g.value.ndim else g.value
        root = torch.stack(self._dt).sqrt()
        lead = (1,) * (strength.ndim - root.ndim + 1)
        return (root.reshape(len(root), *lead, *root.shape[1:]) * strength.to(root)).unbind(0)

    @property
    def width(self) -> int:
        """``M``, the number of standard normals of a step."""
        return self.channels if self.plain else self._scale.shape[-1]

    def _push(self, n: int, z: Tensor, e: Tensor) -> Tensor:
        """Take step ``n`` along increments ``e (..., M)``, the control included."""
        control = self.sde.control
        if control is not None:
            e = control.shape_increment(n, self._times[n], self._dt[n], z, e, self.channels)
        return step_everywhere(self.sde, self.stops.ts[..., n : n + 2], z.unsqueeze(0), e.unsqueeze(0))[0]
