"""Inputs over time: values at some times, read at any time, with or without batches, gaps and grids per series."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, as_time_grid, check_choice, check_no_gradient, values_are_checked
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Interpolation"]

_KINDS = ("linear", "previous", "cubic")


class Interpolation(nn.Module):
    r"""A function of time through given values, such as a covariate, a protocol or a dose rate.

    It is called in drifts and diffusions with the time that these get, whatever its axes: of no axes, with time leading, or a
    column of times per series. Before the first time it has the first value, after the last time the last one.

    Use ``"previous"`` for what is switched (doses, treatments, protocols), ``"linear"`` for what is measured now and then, and
    ``"cubic"`` where the drift should be smooth: it passes through all values and overshoots none, so positive values stay positive.

    Args:
        times: The times ``(T,)`` of the values, strictly increasing, or ``(*batch, T)`` where every series has its own, as in
            ``panel.times``.
        values: The values ``(T,)``, ``(T, c)`` or ``(*batch, T, c)``. NaN is a gap, which its neighbours in time fill.
        kind: What holds between times: ``"linear"``, ``"previous"`` for the value of the time before, or ``"cubic"`` for a
            monotone cubic polynomial.

    Raises:
        TimeGridError: If the times don't increase strictly.
        ShapeError: If times and values don't fit.
        InvalidInputError: If a component has no value at all.

    Example:
        >>> u = Interpolation([0.0, 1.0, 3.0], [0.0, 2.0, float("nan")])
        >>> u(torch.tensor(0.5)), u.at([0.25, 2.0]).flatten()
        (tensor([1.]), tensor([0.5000, 2.0000]))

    Reference:
        Fritsch and Butland, "A method for constructing local monotone piecewise cubic interpolants", 1984.
    """

    times: Tensor
    _values: Tensor
    leaving: Tensor
    arriving: Tensor

    def __init__(self, times: Any, values: Any, kind: str = "linear") -> None:
        super().__init__()
        check_choice(kind, _KINDS, "kind")
        check_no_gradient(times, "times", "an interpolation", "give the values of a learnt function of time")
        knots = as_time_grid(times, "times", min_points=1, batch=True)
        table = as_tensor(values, "values", missing=True)
        if table.ndim == 1:
            table = table.unsqueeze(-1)
        if table.ndim < 2 or table.shape[-2] != knots.shape[-1]:
            raise ShapeError(
                "values must have one row per time",
                got=f"shape {tuple(table.shape)}",
                expected=f"(..., {knots.shape[-1]}, c)",
                hint="a scalar input of several series is values[..., None]"
                if table.ndim == knots.ndim
                else None,
            )
        try:
            self.batch_shape = torch.broadcast_shapes(knots.shape[:-1], table.shape[:-2])
        except RuntimeError as error:
            raise ShapeError(
                "times and values have batch axes that don't fit each other",
                got=f"{tuple(knots.shape)} and {tuple(table.shape)}",
            ) from error
        if kind == "cubic" and table.requires_grad:
            raise InvalidInputError(
                "a cubic interpolation isn't differentiable in its values", hint="use kind='linear'"
            )
        self.kind = kind
        self.register_buffer("times", knots.detach().clone())
        if kind == "cubic":
            # Slopes at the beginning and at the end of the step after each time: they differ where a value is held.
            self.register_buffer("leaving", _through(self.times, table, lambda t, y: _slopes(t, y)[0]))
            self.register_buffer("arriving", _through(self.times, table, lambda t, y: _slopes(t, y)[1]))
        filled = _filled(self.times, table, kind)
        if isinstance(values, nn.Parameter) and filled is table:
            self.register_parameter("_values", values)
        else:
            self.register_buffer("_values", filled if filled.requires_grad else filled.detach().clone())

    @property
    def values(self) -> Tensor:
        """The values ``(*batch, T, c)`` as they are now, gaps filled."""
        return self._values if self._values.ndim > 1 else self._values.unsqueeze(-1)

    def forward(self, t: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the values ``(..., c)`` at times of no axes or of axes ``(..., 1)``, as drifts get them; ``x`` plays no part."""
        time = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=self.times.dtype)
        if time.ndim and time.shape[-1] != 1:
            raise ShapeError(
                "t must broadcast with x[..., :1]",
                got=f"shape {tuple(time.shape)}",
                hint="values at times (n,) are at(times)",
            )
        shape = time.shape[:-1] if time.ndim else time.shape
        try:
            full = torch.broadcast_shapes(shape, self.batch_shape)
        except RuntimeError as error:
            raise ShapeError(
                "t and the batch of the interpolation don't fit each other",
                got=f"{tuple(time.shape)} and {tuple(self.batch_shape)}",
            ) from error
        lead = full[: len(full) - len(self.batch_shape)]
        query = time.reshape(shape).expand(full).reshape(lead.numel(), *self.batch_shape)
        found = self._read(query.movedim(0, -1))
        return found.movedim(-2, 0).reshape(*full, found.shape[-1])

    def at(self, times: Any) -> Tensor:
        """Return the values ``(n, *batch, c)`` at times ``(n,)``, as coefficients of linear laws are written."""
        query = as_tensor(times, "times", 1, "(n,)", like=self.times)
        return self(query.reshape(-1, *(1,) * (len(self.batch_shape) + 1)))

    def _read(self, query: Tensor) -> Tensor:
        """Return the values ``(*batch, Q, c)`` at times ``(*batch, Q)``."""
        # Both in one precision: rounded differently, a time on a knot could come to lie before it.
        knots = self.times.to(query)
        count = knots.shape[-1]
        shared = knots.ndim == 1
        inside = (
            query if shared else query.contiguous(),
            knots if shared else knots.expand(*query.shape[:-1], count).contiguous(),
        )
        right = torch.searchsorted(inside[1].detach(), inside[0].detach().contiguous(), right=True)
        left = (right - 1).clamp(0, max(count - 2, 0))
        if self.kind == "previous":
            return self._pick(self.values, (right - 1).clamp(0, count - 1))
        if count == 1:
            return self._pick(self.values, torch.zeros_like(left))
        before, after = (
            knots[place] if shared else inside[1].gather(-1, place) for place in (left, left + 1)
        )
        gap = after - before
        share = ((query - before) / gap).clamp(0, 1).to(self.values).unsqueeze(-1)
        first, second = self._pick(self.values, left), self._pick(self.values, left + 1)
        if self.kind == "linear":
            return first + share * (second - first)
        # Hermite's cubic on an interval of length h: values and slopes at both ends.
        h = gap.to(self.values).unsqueeze(-1)
        slope, next_slope = self._pick(self.leaving, left) * h, self._pick(self.arriving, left) * h
        rise = second - first
        bend, twist = 3 * rise - 2 * slope - next_slope, slope + next_slope - 2 * rise
        return first + share * (slope + share * (bend + share * twist))

    def _pick(self, table: Tensor, index: Tensor) -> Tensor:
        """Return rows ``(*batch, Q, c)`` of a table ``(*batch, T, c)``."""
        if table.ndim == 2:
            return table[index]
        table = table.expand(*index.shape[:-1], *table.shape[-2:])
        return table.gather(-2, index.unsqueeze(-1).expand(*index.shape, table.shape[-1]))


def _filled(times: Tensor, values: Tensor, kind: str) -> Tensor:
    """Return values without NaN: what the interpolation through the others has at these times."""
    lost = values.detach().isnan()
    if values_are_checked():
        if not bool(lost.any()):
            return values
        if bool(lost.all(-2).any()):
            raise InvalidInputError(
                "every component needs a value at some time", got="one that is NaN throughout"
            )
    count = values.shape[-2]
    place = torch.arange(count, device=values.device).unsqueeze(-1).expand_as(lost)
    # The nearest times before and after that have a value.
    before = torch.where(lost, -1, place).cummax(-2).values
    after = torch.where(lost, count, place).flip(-2).cummin(-2).values.flip(-2)
    left = torch.where(before < 0, after, before)
    right = torch.where(after >= count, before, after).clamp(0, count - 1)
    right = torch.where(before < 0, after, right)
    safe = torch.where(lost, torch.zeros_like(values), values)
    first = safe.gather(-2, left)
    if kind == "previous":
        return first
    if kind == "cubic":
        return _through(times, values, _pchip)
    second = safe.gather(-2, right)
    at = (
        times.unsqueeze(-1).expand_as(values)
        if times.ndim == 1
        else times.unsqueeze(-1).expand(*values.shape)
    )
    gap = at.gather(-2, right) - at.gather(-2, left)
    share = torch.where(gap > 0, (at - at.gather(-2, left)) / torch.where(gap > 0, gap, 1.0), 0.0)
    return torch.lerp(first, second, share.to(values))


def _pchip(times: np.ndarray, values: np.ndarray, order: int = 0) -> np.ndarray:
    """Return a monotone cubic through the values that aren't NaN, or its derivative, at all times, held at both ends."""
    from scipy.interpolate import PchipInterpolator

    known = ~np.isnan(values)
    if known.sum() == 1:
        return np.full_like(values, values[known][0] if order == 0 else 0.0)
    inside = np.clip(times, times[known][0], times[known][-1])
    return np.asarray(PchipInterpolator(times[known], values[known])(inside, order))


def _slopes(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slopes at both ends of the step after each time; zero where the step lies before or after all values."""
    slope, known = _pchip(times, values, 1), np.flatnonzero(~np.isnan(values))
    place = np.arange(len(times))
    inside = (place >= known[0]) & (place < known[-1])
    return np.where(inside, slope, 0.0), np.where(inside, np.append(slope[1:], 0.0), 0.0)


def _through(times: Tensor, values: Tensor, function: Any) -> Tensor:
    """Apply a function of times and values to every series and component."""
    columns = values.detach().movedim(-1, -2)
    grids = times.expand(*columns.shape[:-2], times.shape[-1]).unsqueeze(-2).expand_as(columns)
    rows = zip(
        grids.reshape(-1, times.shape[-1]).cpu().double().numpy(),
        columns.reshape(-1, times.shape[-1]).cpu().double().numpy(),
        strict=True,
    )
    found = torch.as_tensor(np.stack([function(*row) for row in rows])).to(values)
    return found.reshape(columns.shape).movedim(-1, -2).contiguous()
