"""An encoder that tells, at every time of a grid, what the observations from there on say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochdyn._checks import check_positive_int
from stochdyn.fractional.latent.series import Series

__all__ = ["Contexts", "SeriesEncoder"]

# how fast nearness to the next observation falls off, in units of the grid's length
_NEAR = (4.0, 16.0, 64.0, 256.0)


class SeriesEncoder(nn.Module):
    r"""A recurrent network that reads each series backwards, one step per observation.

    Given the present state, the posterior of the future path depends on the data to come and on nothing else; so the context
    at t is the summary of all observations at t and after, with the time until the first of them. The cost
    grows with the observations, not with the grid. Missing components enter as zeros with their mask.

    Args:
        obs_dim: The number p of components of an observation.
        width: The size of the summary.
        span: The length of the grid, which scales time.
        start_time: The beginning of the grid, from which time is counted.
    """

    def __init__(self, obs_dim: int, width: int = 64, span: float = 1.0, start_time: float = 0.0) -> None:
        super().__init__()
        check_positive_int(obs_dim, "obs_dim")
        check_positive_int(width, "width")
        self.gru = nn.GRU(2 * obs_dim + 2, width)
        self.after = nn.Parameter(torch.zeros(width))
        self.span, self.start_time = span, start_time
        self.width = width + 2 + len(_NEAR)

    def summaries(self, series: Series) -> Tensor:
        """Return ``(n+1, B, width)``: what observation i and all later ones say; the last row is that of none."""
        times = ((series.times - self.start_time) / self.span).to(series.values)
        gap = torch.nn.functional.pad(times.diff(dim=1), (0, 1))
        seen = series.mask.to(series.values)
        features = torch.cat([series.values * seen, seen, gap.unsqueeze(-1), times.unsqueeze(-1)], -1)
        states = self.gru(features.movedim(1, 0).flip(0))[0].flip(0)
        return torch.cat([states, self.after.expand(1, *states.shape[1:])])

    def lookup(self, series: Series, ts: Tensor) -> Contexts:
        """Return the contexts at the times ``ts (T,)``, to be had all at once or one by one."""
        grid = ts.to(series.times).expand(len(series), -1).contiguous()
        # The next observation at or after each time, and how long until it comes.
        following = torch.searchsorted(series.times.contiguous(), grid - 1e-6 * self.span).T  # (T, B)
        last = series.times.shape[1] - 1
        ahead = series.times.T.gather(0, following.clamp_max(last)) - grid.T
        none = (following > last).to(series.values)
        wait = (ahead.clamp_min(0.0) / self.span).to(none) * (1 - none)
        # the pull towards an observation grows as the inverse of the time that is left
        near = [(1 - none) / (1 + rate * wait) for rate in _NEAR]
        return Contexts(self.summaries(series), following, torch.stack([wait, none, *near], -1))

    def forward(self, series: Series, ts: Tensor) -> Tensor:
        """Return contexts ``(T, B, self.width)`` at the times ``ts (T,)``."""
        return self.lookup(series, ts).all()


@dataclass(frozen=True)
class Contexts:
    """What the encoder says at every time of a grid; long grids of it are large, so it can be had one by one.

    Attributes:
        summaries: The summaries ``(n+1, B, width)`` of what each observation and all later ones say; the last row is that of none.
        following: The index ``(T, B)`` of the summary that holds at each time.
        nearness: The nearness ``(T, B, c)`` of the next observation.
    """

    summaries: Tensor
    following: Tensor
    nearness: Tensor

    def at(self, n: int) -> Tensor:
        """Return ``(B, width + c)`` at the n-th time."""
        row = self.following[n][None, :, None].expand(-1, -1, self.summaries.shape[-1])
        return torch.cat([self.summaries.gather(0, row)[0], self.nearness[n]], -1)

    def all(self) -> Tensor:
        """Return ``(T, B, width + c)``."""
        width, extra = self.summaries.shape[-1], self.nearness.shape[-1]
        # the columns of nearness are filled in place: copies of a long grid cost memory
        states = torch.nn.functional.pad(self.summaries, (0, extra))
        context = states.gather(0, self.following.unsqueeze(-1).expand(-1, -1, width + extra))
        context[..., width:] = self.nearness
        return context
