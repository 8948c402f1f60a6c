"""When an evolution must stop and how far it may step: output times, breaks of the coefficients, and their pulses."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stochdyn._checks import check_real
from stochdyn.errors import InvalidInputError, LindbladianError
from stochdyn.povm.lindblad.lindbladian import check_rate
from stochdyn.povm.master.arguments import as_breaks

if TYPE_CHECKING:
    from torch import Tensor

    from stochdyn.povm.lindblad.coefficients import Coefficient
    from stochdyn.povm.lindblad.lindbladian import Lindbladian
    from stochdyn.povm.lindblad.terms import CollectiveJump, Term

__all__ = ["Schedule", "Segment", "make_schedule"]

_LOOKS, _LOOKS_BETWEEN, _MAX_LOOKS = 4096, 32, 200_000
_MAX_JUMPS = 512
_LARGEST_PART = 1 / 32
_VARIATION = 0.25


@dataclass(frozen=True)
class Segment:
    """A span of time on which all coefficients are smooth.

    Attributes:
        start: The first time; coefficients are evaluated at it, not before.
        end: The last time.
        output: The index of the output time at its end, or None where there is none.
    """

    start: float
    end: float
    output: int | None


class Schedule:
    """The smooth segments between output times, and the longest step at any time.

    A solver that controls its step by an error estimate sees the coefficients only where it evaluates them, so a pulse
    after a quiet stretch can fall between. Therefore coefficients are looked at in 4096 places, jumps are found by
    bisection, steps end where a coefficient starts or ceases to move, and none is longer than a quarter of the range
    of any of them.

    Args:
        ts: The output times.
        segments: The segments in order, without gaps wider than rounding.
        knots: The increasing times at which the variation is known, or none for coefficients that are constant.
        variation: The largest variation of any coefficient, relative to its range, up to each of them.
        max_step: The longest step allowed, infinite for no bound.
    """

    def __init__(
        self,
        ts: Sequence[float],
        segments: Sequence[Segment],
        knots: Sequence[float] = (),
        variation: Sequence[float] = (),
        max_step: float = math.inf,
    ) -> None:
        self.ts, self.segments, self.max_step = list(ts), list(segments), max_step
        self._knots, self._variation = list(knots), list(variation)
        self.span = self.ts[-1] - self.ts[0]

    def longest(self, t: float) -> float:
        """Return the length that a step from a time must not exceed."""
        if not self._knots:
            return self.max_step
        place = min(max(bisect_right(self._knots, t) - 1, 0), len(self._knots) - 1)
        # as far as the coefficients may vary by a quarter of their range
        target = self._variation[place] + _VARIATION
        last = min(bisect_right(self._variation, target), len(self._knots) - 1)
        reach = self._knots[last] - t
        cell = self._knots[1] - self._knots[0] if len(self._knots) > 1 else self.span
        return min(self.max_step, max(reach, cell), _LARGEST_PART * self.span)

    def segment_of(self, t: float) -> Segment:
        """Return the segment that a step from a time belongs to."""
        ends = [segment.end for segment in self.segments]
        return self.segments[min(bisect_right(ends, t), len(ends) - 1)]


def make_schedule(
    model: Lindbladian,
    ts: Tensor,
    *,
    max_step: float | None = None,
    breaks: Any = (),
    values: Mapping[str, Tensor] | None = None,
) -> Schedule:
    """Return the schedule of an evolution, with every coefficient looked at.

    Args:
        model: The Lindbladian, its parameters bound.
        ts: The output times ``(T,)``.
        max_step: The longest step allowed; coefficients are looked at twice as often.
        breaks: The times where coefficients aren't smooth.
        values: The values ``(n,)`` of parameters that aren't bound, by name; the schedule then serves all ``n`` draws.

    Raises:
        LindbladianError: If a coefficient isn't finite, or a rate is negative.
        InvalidInputError: If ``max_step`` isn't positive.
    """
    grid = [float(t) for t in ts]
    span = grid[-1] - grid[0]
    longest = math.inf
    if max_step is not None:
        check_real(max_step, "max_step", above=0.0)
        longest = float(max_step)
        if span / longest > 1e7:
            raise InvalidInputError("max_step is too short", got=f"{max_step:g} for a span of {span:g}")
    given = as_breaks(breaks)
    moving = {term.coupling.key: term.coupling for term in model.terms if term.coupling.uses_time}
    known = (
        {} if values is None else {name: v.detach().double().cpu().reshape(-1) for name, v in values.items()}
    )
    for jump in model.jumps:
        if jump.coupling.free and not jump.coupling.uses_time:
            _check_rates(jump, _table(jump.coupling, grid[:1], known), grid[:1])
    if len(grid) == 1 or not moving:
        for jump in model.jumps:
            if jump.coupling.uses_time:
                _check_rates(jump, _table(jump.coupling, grid, known), grid)
        cuts = [_around(b) for b in given]
        return Schedule(grid, _segments(grid, cuts) if len(grid) > 1 else [], max_step=longest)
    looks = _looks(grid, longest)
    jumps: list[tuple[float, float]] = [_around(b) for b in given]
    soft: list[float] = []
    total = np.zeros(len(looks) - 1)
    for key, coupling in moving.items():
        relative = replace(coupling, factor=1.0)
        owned = [jump for jump in model.jumps if jump.coupling.key == key]
        jumps += [_around(b) for b in coupling.breaks]
        for draw, row in enumerate(_table(relative, looks.tolist(), known)):
            for jump in owned:
                _check_rates(jump, jump.coupling.factor * row[None], looks)
            reach = float(row.max() - row.min())
            if reach <= 1e-13 * float(np.abs(row).max()):
                continue
            change = np.abs(np.diff(row)) / reach
            found = _find_jumps(partial(_value, relative, known, draw), looks, change)
            # no step crosses a jump, so its height says nothing about the steps beside it
            smooth = change.copy()
            smooth[[int(np.searchsorted(looks, low, side="right")) - 1 for low, _ in found]] = 0.0
            total = np.maximum(total, smooth)
            for jump in owned:
                sides = [t for pair in found for t in pair if grid[0] <= t <= grid[-1]]
                at = np.array([[_value(relative, known, draw, t) for t in sides]])
                _check_rates(jump, jump.coupling.factor * at, sides)
            jumps += found
            active = change > 1e-9
            edges = np.nonzero(active[1:] != active[:-1])[0] + 1
            soft += looks[edges].tolist()
    segments = _segments(grid, jumps, soft)
    return Schedule(grid, segments, looks.tolist(), [0.0, *np.cumsum(total).tolist()], longest)


def _table(coupling: Coefficient, times: Sequence[float], known: Mapping[str, Tensor]) -> np.ndarray:
    """Return the values ``(n, T)`` of a coefficient for all draws of its parameters; one row if it has none."""
    own = {name: known[name] for name in coupling.free if name in known}
    size = max((len(v) for v in own.values()), default=1)
    grid = torch.tensor(times, dtype=torch.float64)
    with torch.no_grad():
        if not own or not coupling.uses_time:
            numbers = {name: v.expand(size) for name, v in own.items()}
            columns = [coupling.relative(t, numbers).expand(size) for t in grid]
            table = torch.stack(columns, 1)
        elif coupling.takes_many_times:
            table = coupling.relative(grid, {name: v[:, None] for name, v in own.items()}).expand(
                size, len(grid)
            )
        else:
            table = torch.stack([coupling.relative(t, own).expand(size) for t in grid], 1)
    table = coupling.factor * table
    bad = (~torch.isfinite(table)).any(0).nonzero()
    if len(bad):
        raise LindbladianError("a coefficient isn't finite", got=f"at time {float(grid[bad[0, 0]]):g}")
    return table.numpy()


def _value(coupling: Coefficient, known: Mapping[str, Tensor], draw: int, t: float) -> float:
    """Return the value of a coefficient at a time for one draw of the parameters."""
    own = {name: known[name][min(draw, len(known[name]) - 1)] for name in coupling.free if name in known}
    with torch.no_grad():
        return coupling.factor * float(coupling.relative(torch.tensor(t, dtype=torch.float64), own))


def _check_rates(jump: Term | CollectiveJump, rates: np.ndarray, times: Sequence[float] | np.ndarray) -> None:
    """Raise if one of the rates ``(n, T)`` of a jump is negative."""
    if rates.size:
        lowest = rates.min(0)
        worst = int(lowest.argmin())
        check_rate(float(lowest[worst]), float(times[worst]), jump.sites)


def _looks(grid: Sequence[float], longest: float) -> np.ndarray:
    """Return the times at which coefficients are looked at, output times among them."""
    span = grid[-1] - grid[0]
    wanted = span / _LOOKS if math.isinf(longest) else min(span / _LOOKS, longest / 2)
    wanted = max(wanted, span / _MAX_LOOKS)
    between = _LOOKS_BETWEEN if len(grid) < _LOOKS else 2
    parts = []
    for start, end in itertools.pairwise(grid):
        count = max(between, math.ceil((end - start) / wanted))
        parts.append(np.linspace(start, end, count, endpoint=False))
    return np.append(np.concatenate(parts), grid[-1])


def _find_jumps(
    value: Callable[[float], float], looks: np.ndarray, change: np.ndarray
) -> list[tuple[float, float]]:
    """Return the neighbouring floating times between which a coefficient jumps."""
    around = np.maximum(np.append(change[1:], 0.0), np.insert(change[:-1], 0, 0.0))
    suspects = np.nonzero((change > 0.02) | (change > 100 * np.maximum(around, 1e-11)))[0]
    suspects = suspects[np.argsort(-change[suspects], kind="stable")[:_MAX_JUMPS]]
    found = []
    for i in sorted(suspects.tolist()):
        low, high = float(looks[i]), float(looks[i + 1])
        at_low, at_high = value(low), value(high)
        # bisection to neighbouring floats: a jump keeps its height, a steep slope loses it
        whole = abs(at_high - at_low)
        while True:
            middle = low + (high - low) / 2
            if not low < middle < high:
                break
            at = value(middle)
            if abs(at - at_low) >= abs(at_high - at):
                high, at_high = middle, at
            else:
                low, at_low = middle, at
            if abs(at_high - at_low) < 0.1 * whole:
                break
        if abs(at_high - at_low) >= 0.1 * whole:
            found.append((low, high))
    return found


def _around(t: float) -> tuple[float, float]:
    """Return the floats before and after a break, neither of them at it."""
    return math.nextafter(t, -math.inf), math.nextafter(t, math.inf)


def _segments(
    grid: Sequence[float], jumps: Iterable[tuple[float, float]], soft: Iterable[float] = ()
) -> list[Segment]:
    """Cut the span at output times, at jumps (from both sides) and where coefficients start to move."""
    # each cut is (time, end of the segment before, start of the one after, output)
    first, last = grid[0], grid[-1]
    span = last - first
    cuts: list[tuple[float, float, float, int | None]] = [(t, t, t, i) for i, t in enumerate(grid) if i > 0]
    cuts += [(low, low, high, None) for low, high in set(jumps) if first < high and low < last]
    cuts += [(t, t, t, None) for t in set(soft) if first < t < last]
    cuts.sort(key=lambda cut: (cut[0], cut[3] is not None))
    segments: list[Segment] = []
    start = first
    for _, end, after, output in cuts:
        if output is None and (end - start) <= 1e-15 * span:
            start = max(start, after)  # nothing happens in so short a time
            continue
        if output is not None and end <= start:
            segments.append(Segment(end, end, output))  # an output time within a jump
            continue
        segments.append(Segment(start, end, output))
        start = max(after, end)
    return segments


def check_finite_rates(values: np.ndarray, t: float) -> None:
    """Raise if a rate of change isn't finite.

    Raises:
        LindbladianError: If a rate of change isn't finite; the message names the time.
    """
    if not np.isfinite(values).all():
        raise LindbladianError("the rate of change isn't finite", got=f"at time {t:g}")
