"""The grids on which the paths of a panel are computed: one per series, through its own times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_ndim
from stochdyn.errors import ShapeError, TimeGridError

__all__ = ["PanelGrid", "grid_through"]

# Relative: what a gap may exceed a whole number of steps by.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PanelGrid:
    """Grids through the times of every series, and where those times lie in them.

    Attributes:
        ts: The grids ``(N, G)``, strictly increasing along each series.
        index: The positions ``(N, T)`` of the panel's times in the grids.
    """

    ts: Tensor
    index: Tensor

    def read(self, x: Tensor) -> Tensor:
        """Return the states of paths at the panel's times.

        Args:
            x: The paths on the grids, ``(..., N, G, d)``.

        Returns:
            The states ``(..., N, T, d)``.

        Raises:
            ShapeError: If the paths don't lie on the grids.

        Example:
            >>> import stochdyn as sd
            >>> grid = sd.Panel.from_arrays([[1.0, 2.0]], [[0.5, 0.7]]).grid(dt=0.5, start=0.0)
            >>> grid.ts, grid.read(grid.ts[..., None])[..., 0]
            (tensor([[0.0000, 0.5000, 1.0000, 1.5000, 2.0000]]), tensor([[1., 2.]]))
        """
        check_ndim(x, tuple(range(2, 16)), "x", "(..., series, time, dim)")
        # A plate whose series all share one path gives it an axis of size one, or none.
        if x.shape[-2] != self.ts.shape[-1] or (x.ndim > 2 and x.shape[-3] not in (1, self.ts.shape[0])):
            raise ShapeError(
                "the paths don't lie on the grids of the panel",
                got=f"shape {tuple(x.shape)}",
                expected=f"(..., {self.ts.shape[0]}, {self.ts.shape[1]}, d)",
            )
        num_series, count = self.index.shape
        lead = x.shape[:-3] if x.ndim > 2 else ()
        x = x.expand(*lead, num_series, *x.shape[-2:])
        index = self.index.unsqueeze(-1).expand(*lead, num_series, count, x.shape[-1])
        return x.gather(-2, index)


def grid_through(times: Tensor, lengths: Tensor, dt: float | None, start: Tensor | None) -> PanelGrid:
    """Return grids through ``times (N, T)`` in steps of at most ``dt``, each gap in equal steps.

    Args:
        times: The times of each series, strictly increasing; those past its length fill up its row.
        lengths: The numbers of times of each series, ``(N,)``.
        dt: The longest step; None takes the times themselves.
        start: The times ``(N,)`` at which the grids begin; None for the first time of each series.

    Raises:
        TimeGridError: If a series has a time before its start.
    """
    nodes, offset = times, torch.zeros_like(lengths)
    if start is not None:
        early = (start > times[:, 0]).nonzero()
        if early.numel():
            late = int(early[0])
            raise TimeGridError(
                "start must not lie after a time of the panel",
                got=f"start {start[late].item():g} and time {times[late, 0].item():g} of series {late}",
            )
        # A series that is seen at its start has that node already; its row takes one more at the end.
        before = (start < times[:, 0]).unsqueeze(-1)
        step = times[:, -1:] - times[:, -2:-1] if times.shape[1] > 1 else torch.ones_like(times)
        nodes = torch.where(
            before,
            torch.cat([start.unsqueeze(-1), times], -1),
            torch.cat([times, times[:, -1:] + step], -1),
        )
        offset = before.squeeze(-1).long()
    gaps = nodes[:, 1:] - nodes[:, :-1]
    count = torch.ones_like(gaps, dtype=torch.long)
    if dt is not None:
        # A gap that exceeds a whole number of steps by rounding alone takes no further step.
        blur = 4 * torch.finfo(times.dtype).eps * torch.maximum(nodes[:, 1:].abs(), nodes[:, :-1].abs()) / dt
        count = torch.ceil(gaps / dt * (1.0 - _ROUNDING) - blur).long().clamp_min(1)
        own = torch.arange(gaps.shape[1], device=times.device) < (lengths + offset).unsqueeze(-1) - 1
        count = torch.where(own, count, torch.ones_like(count))
    place = torch.cat([torch.zeros_like(count[:, :1]), count.cumsum(-1)], -1)
    at_times = place.gather(-1, torch.arange(times.shape[1], device=times.device) + offset.unsqueeze(-1))
    size = int(place[:, -1].max()) + 1
    at = torch.arange(size, device=times.device).expand(times.shape[0], size).contiguous()
    # The gap that a grid point lies in, and its share of it; beyond the last node steps go on like the last one.
    k = (torch.searchsorted(place, at, right=True) - 1).clamp(0, max(gaps.shape[1] - 1, 0))
    if gaps.shape[1] == 0:
        return PanelGrid(nodes, at_times)
    share = (at - place.gather(-1, k)).to(times.dtype) / count.gather(-1, k).to(times.dtype)
    ts = nodes.gather(-1, k) + share * gaps.gather(-1, k)
    # The panel's own times stand in the grid to the bit.
    ts = ts.scatter(-1, place, nodes)
    return PanelGrid(ts, at_times)
