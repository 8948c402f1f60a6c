"""Jump paths: ragged times and states, and what is counted along them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_positive_int
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

if TYPE_CHECKING:
    from stochdyn.core.law.measure import PathMeasure

__all__ = ["JumpRecord"]


@dataclass(frozen=True)
class JumpRecord:
    """Paths of a jump process, in full: a kind of :class:`stochdyn.core.Path` without increments.

    Attributes:
        times: The times of the jumps in order, padded with infinity, ``(*shape, N)``.
        states: The states before the first jump and after each, padded with the last, ``(*shape, N + 1)``.
        num_jumps: The number of jumps of each path, ``(*shape,)``.
        ts: The grid that the path was asked for, ``(T,)``; the record ends at its last time.
        num_states: The number of states S.
        law: The law that drew the path, or None for an observed one.
        start_time: The time at which the record starts, which may be before the grid; that of the grid if None.

    Example:
        >>> record = JumpRecord.of([0.4, 1.1, 1.7], [0, 1, 2, 0], horizon=2.0, num_states=3)
        >>> record.at([0.0, 0.4, 1.0, 2.0]).tolist(), record.dwell.round(decimals=3).tolist()
        ([0, 1, 1, 0], [0.7, 0.7, 0.6])
    """

    times: Tensor
    states: Tensor
    num_jumps: Tensor
    ts: Tensor
    num_states: int
    law: PathMeasure | None = field(default=None, repr=False, compare=False)
    start_time: float | None = None

    @classmethod
    def of(
        cls, times: object, states: object, horizon: float, num_states: int, start_time: float = 0.0
    ) -> JumpRecord:
        """Return one observed path.

        Args:
            times: The increasing times of its jumps, within the record, ``(N,)``.
            states: The state before the first jump and after each, ``(N + 1,)``.
            horizon: The time at which the record ends.
            num_states: The number of states S.
            start_time: The time at which the record starts.

        Raises:
            InvalidInputError: If states are out of range, or a jump goes nowhere.
            TimeGridError: If times don't increase, or lie outside the record.
        """
        check_positive_int(num_states, "num_states", 2)
        double = torch.empty((), dtype=torch.float64)
        span = as_time_grid([start_time, horizon], "the record's ends", like=double).double()
        at = (
            as_tensor(times, "times", 1, "(N,)", like=double).double()
            if not _empty(times)
            else torch.zeros(0).double()
        )
        where = as_tensor(states, "states", 1, "(N + 1,)")
        if len(where) != len(at) + 1:
            raise ShapeError("there must be one state more than jumps", got=f"{len(where)} and {len(at)}")
        ends = torch.cat([span[:1], at, span[1:]])
        if bool((ends[1:] - ends[:-1] < 0).any()) or bool((at[1:] <= at[:-1]).any()):
            raise TimeGridError("times must increase strictly within the record", got=at.tolist()[:6])
        whole = where.long()
        if bool((whole != where).any()) or bool((whole < 0).any()) or bool((whole >= num_states).any()):
            raise InvalidInputError("states must be whole numbers below num_states", got=where.tolist()[:6])
        if bool((whole[1:] == whole[:-1]).any()):
            raise InvalidInputError("a jump must change the state", got=whole.tolist()[:6])
        return cls(at, whole, torch.tensor(len(at)), span, num_states)

    @property
    def shape(self) -> torch.Size:
        """Sample and batch shape."""
        return self.num_jumps.shape

    @property
    def ends(self) -> Tensor:
        """The times at which the record starts and ends, ``(2,)``."""
        first = self.ts[0] if self.start_time is None else self.ts.new_tensor(self.start_time)
        return torch.stack([first, self.ts[-1]])

    @property
    def duration(self) -> float:
        """The time from the record's start to its end."""
        return float(self.ends[1] - self.ends[0])

    @property
    def x(self) -> Tensor:
        """The states at the times of the grid as numbers, ``(*shape, T, 1)``."""
        return self.at(self.ts).to(self.times.dtype).unsqueeze(-1)

    def at(self, ts: object) -> Tensor:
        """Return the states at times, right-continuous: after a jump at that time, ``(*shape, T)``.

        Raises:
            TimeGridError: If a time lies outside the record.
        """
        grid = as_tensor(ts, "ts", (0, 1), "(T,)", like=self.times).double()
        flat = grid.reshape(-1)
        first, last = self.ends.tolist()
        if bool((flat < first).any()) or bool((flat > last).any()):
            raise TimeGridError("ts leaves the record", expected=f"[{first:g}, {last:g}]")
        index = torch.searchsorted(
            self.times.contiguous(), flat.expand(*self.shape, -1).contiguous().to(self.times), right=True
        )
        return self.states.gather(-1, index).reshape(*self.shape, *grid.shape)

    def _stays(self) -> Tensor:
        """Return how long each state lasted, ``(*shape, N + 1)``; zero for padding."""
        start, end = self.ends.to(self.times)
        inner = self.times.clamp(max=end)
        first = start.expand(*self.shape, 1)
        bounds = torch.cat([first, inner, end.expand(*self.shape, 1)], -1)
        return bounds[..., 1:] - bounds[..., :-1]

    @property
    def dwell(self) -> Tensor:
        """The time spent in each state, ``(*shape, S)``."""
        out = self.times.new_zeros(*self.shape, self.num_states)
        return out.scatter_add(-1, self.states, self._stays())

    @property
    def counts(self) -> Tensor:
        """The numbers of jumps from each state to each other, ``(*shape, S, S)``."""
        pair = self.states[..., :-1] * self.num_states + self.states[..., 1:]
        real = torch.arange(self.times.shape[-1], device=self.times.device) < self.num_jumps[..., None]
        out = self.times.new_zeros(*self.shape, self.num_states**2)
        out = out.scatter_add(-1, pair, real.to(self.times.dtype))
        return out.reshape(*self.shape, self.num_states, self.num_states)

    def detach(self) -> JumpRecord:
        """Return the record itself: jumps carry no derivatives."""
        return replace(self)


def _empty(x: object) -> bool:
    return hasattr(x, "__len__") and len(x) == 0
