"""Doses, infusions and pulses as inputs of an equation, and the grids that step over none of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, as_time_grid, check_ndim, values_are_checked
from stochdyn.core.data.interpolation import Interpolation
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Doses"]


class Doses(nn.Module):
    r"""Amounts that enter a component of the state at known times, at once or over a while.

    Put their times on the grid by :meth:`grid`, and add :meth:`rate` to the drift of the component. The rate is constant during a
    step and delivers exactly what is given in it, a bolus in the step that begins at its time, so no dose is stepped over and none is
    given twice, whatever the grid. Euler steps take it exactly; other methods look at the end of a step too and smear a bolus.

    Args:
        times: The times ``(K,)`` of the doses, or ``(*batch, K)`` where every series has its own; NaN fills up shorter rows.
        amounts: The amounts, a number or in the shape of the times, in units of the component. Differentiable.
        durations: The lengths of the infusions, a number or in the shape of the times, in units of time; zero for a bolus.

    Raises:
        ShapeError: If times, amounts and durations don't fit each other.
        InvalidInputError: If a duration is negative.

    Example:
        >>> doses = Doses([0.0, 1.0], 5.0)
        >>> ts = doses.grid([0.0, 0.8, 1.6])
        >>> ts, doses.rate(ts).at(ts).flatten()
        (tensor([0.0000, 0.8000, 1.0000, 1.6000]), tensor([6.2500, 0.0000, 8.3333, 0.0000]))
    """

    times: Tensor
    amounts: Tensor
    durations: Tensor

    def __init__(self, times: Any, amounts: Any, durations: Any = 0.0) -> None:
        super().__init__()
        at = as_tensor(times, "times", missing=True)
        check_ndim(at, tuple(range(1, 13)), "times", "(K,) or (*batch, K)")
        what = as_tensor(amounts, "amounts", like=at, missing=True)
        length = as_tensor(durations, "durations", like=at, missing=True)
        try:
            shape = torch.broadcast_shapes(at.shape, what.shape, length.shape)
        except RuntimeError as error:
            raise ShapeError(
                "times, amounts and durations don't fit each other",
                got=f"{tuple(at.shape)}, {tuple(what.shape)} and {tuple(length.shape)}",
            ) from error
        if values_are_checked() and bool((length < 0).any()):
            raise InvalidInputError("durations must not be negative", got=float(length.min()))
        given = ~at.isnan()
        for name, value in (
            ("times", torch.where(given, at, torch.inf).expand(shape)),
            ("amounts", torch.where(given, what, 0.0).nan_to_num(0.0).expand(shape)),
            ("durations", torch.where(given, length, 0.0).nan_to_num(0.0).expand(shape)),
        ):
            self.register_buffer(name, value if value.requires_grad else value.detach().clone())

    def grid(self, ts: Any) -> Tensor:
        """Return a grid through ``ts`` and through all beginnings and ends of doses between its first and last time.

        Args:
            ts: The grid ``(T,)``, or ``(*batch, T)``; where doses differ between series, so do the grids.

        Returns:
            ``(T',)`` or ``(*batch, T')``, strictly increasing; rows of series with fewer doses are filled up by halved steps.
        """
        grid = as_time_grid(ts, "ts", batch=True)
        grid = grid.to(torch.promote_types(grid.dtype, self.times.dtype))
        events = torch.cat([self.times, self.times + self.durations], -1).detach().to(grid)
        if grid.ndim == 1 and events.ndim == 1:
            inside = events[(events > grid[0]) & (events < grid[-1])]
            return _distinct(torch.cat([grid, inside]).sort().values)
        batch = torch.broadcast_shapes(grid.shape[:-1], events.shape[:-1])
        grid, events = grid.expand(*batch, -1), events.expand(*batch, -1)
        flat = zip(grid.reshape(-1, grid.shape[-1]), events.reshape(-1, events.shape[-1]), strict=True)
        rows = [
            _distinct(torch.cat([own, at[(at > own[0]) & (at < own[-1])]]).sort().values) for own, at in flat
        ]
        size = max(len(row) for row in rows)
        return torch.stack([_lengthened(row, size) for row in rows]).reshape(*batch, size)

    def rate(self, ts: Any) -> Interpolation:
        """Return the rate of input in every step of a grid, in units of the component per time, as a function of time.

        Args:
            ts: The grid ``(T,)``, or ``(*batch, T)``, on which paths are computed.

        Returns:
            An interpolation with one component, the amount that is given in a step over the length of the step.
        """
        grid = as_time_grid(ts, "ts", batch=True)
        batch = torch.broadcast_shapes(grid.shape[:-1], self.times.shape[:-1])
        at = grid.unsqueeze(-1).to(torch.promote_types(grid.dtype, self.times.dtype))
        begin, length = self.times.unsqueeze(-2), self.durations.unsqueeze(-2)
        bolus = length == 0
        # A time on the grid may differ from that of the dose by rounding, in the coarser precision of the two.
        eps = max(torch.finfo(grid.dtype).eps, torch.finfo(self.times.dtype).eps)
        slack = 4 * eps * torch.maximum(at.detach().abs(), begin.abs()).nan_to_num(posinf=0.0)
        # What has been given before each time: a bolus counts from just after its own.
        past = torch.where(
            bolus,
            (at > begin + slack).to(self.amounts),
            ((at - begin) / torch.where(bolus, 1.0, length)).clamp(0, 1).nan_to_num(0.0).to(self.amounts),
        )
        given = ((past[..., 1:, :] - past[..., :-1, :]) * self.amounts.unsqueeze(-2)).sum(-1)
        rate = given / (grid[..., 1:] - grid[..., :-1]).to(given)
        rate = torch.cat([rate, torch.zeros_like(rate[..., :1])], -1).expand(*batch, grid.shape[-1])
        return Interpolation(grid, rate.unsqueeze(-1), "previous")


def _distinct(times: Tensor) -> Tensor:
    """Return sorted times without those that are the same up to rounding."""
    gap = times[1:] - times[:-1]
    slack = 4 * torch.finfo(times.dtype).eps * torch.maximum(times[1:].abs(), times[:-1].abs())
    keep = torch.cat([torch.ones_like(gap[:1], dtype=torch.bool), gap > slack])
    return times[keep]


def _lengthened(times: Tensor, size: int) -> Tensor:
    """Return a grid with as many more times as ``size`` asks for, each in the middle of the longest step."""
    while len(times) < size:
        n = int((times[1:] - times[:-1]).argmax())
        times = torch.cat([times[: n + 1], (0.5 * (times[n] + times[n + 1])).reshape(1), times[n + 1 :]])
    return times
