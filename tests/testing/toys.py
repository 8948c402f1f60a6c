"""A law of another kind than a diffusion: jumps between levels, whose paths are ragged and have no increments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stochdyn._checks import as_generator, as_sample_shape, as_time_grid, check_choice, check_real, check_type
from stochdyn.core import Marginal, Path, PathMeasure
from stochdyn.errors import TimeGridError, UnavailableError


@dataclass(frozen=True)
class Flips:
    """Paths of a telegraph process: the states on a grid, and the jumps, padded with infinite times.

    Attributes:
        ts: ``(T,)``; x: ``(*sample, T, 1)``.
        start: ``(*sample,)`` the first state, 0 or 1.
        jumps: ``(*sample, J)`` times of the jumps, in order.
        law: the law that drew them.
    """

    ts: Tensor
    x: Tensor
    start: Tensor
    jumps: Tensor
    law: PathMeasure | None = None

    @property
    def shape(self) -> torch.Size:
        """The sample shape."""
        return self.x.shape[:-2]

    def detach(self) -> Flips:
        """The same paths cut off from the graph."""
        return replace(self, x=self.x.detach())


class _Level(Marginal):
    """A state of 0 or 1."""

    def __init__(self, p: Tensor) -> None:
        self.p = p

    def sample(self, sample_shape=(), generator=None) -> Tensor:  # type: ignore[no-untyped-def]
        shape = as_sample_shape(sample_shape)
        u = torch.rand(*shape, 1, dtype=self.p.dtype, generator=as_generator(generator))
        return (u < self.p).to(self.p.dtype)

    @property
    def mean(self) -> Tensor:
        return self.p.reshape(1)

    @property
    def covariance(self) -> Tensor:
        return (self.p * (1 - self.p)).reshape(1, 1)


class Telegraph(PathMeasure):
    """A process that jumps between 0 and 1 from time zero on, with rates ``up`` and ``down``."""

    def __init__(self, up: float, down: float, start: float = 0.5) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.tensor(up, dtype=torch.float64))
        self.down = nn.Parameter(torch.tensor(down, dtype=torch.float64))
        self.register_buffer("start", torch.tensor(start, dtype=torch.float64))
        self.start: Tensor

    def sample(self, ts, sample_shape=(), generator=None) -> Flips:  # type: ignore[no-untyped-def]
        ts = as_time_grid(ts, like=self.up)
        shape, source = as_sample_shape(sample_shape), as_generator(generator)
        if ts[0] < 0:
            raise TimeGridError("the process starts at time zero", got=float(ts[0]))
        first = (torch.rand(shape, dtype=torch.float64, generator=source) < self.start).long()
        t, state, jumps = torch.zeros(shape, dtype=torch.float64), first, []
        while bool((t < ts[-1]).any()):
            wait = -torch.rand(shape, dtype=torch.float64, generator=source).log()
            t = t + wait / torch.where(state == 0, self.up.detach(), self.down.detach())
            state = 1 - state
            jumps.append(t)
        times = torch.stack(jumps, -1)
        times = torch.where(times <= ts[-1], times, torch.inf)
        count = (times.unsqueeze(-2) <= ts.double().unsqueeze(-1)).sum(-1)
        x = ((first.unsqueeze(-1) + count) % 2).double().unsqueeze(-1)
        return Flips(ts, x, first, times, self)

    def marginal(self, t) -> Marginal:  # type: ignore[no-untyped-def]
        check_real(t, "t")
        if t < 0:
            raise TimeGridError("the process starts at time zero", got=float(t))
        total = self.up + self.down
        rest = self.up / total
        return _Level(rest + (self.start - rest) * torch.exp(-total * t))

    def log_rn(  # type: ignore[no-untyped-def]
        self, path: Path, other: PathMeasure, estimator="density", *, recorded=False
    ) -> Tensor:
        check_choice(estimator, ("density", "rate", "stl"), "estimator")
        check_type(path, Flips, "path")
        check_type(other, Telegraph, "other")
        if estimator != "density":
            raise UnavailableError("paths that jump aren't differentiable in the rates")
        return self._log_prob(path) - other._log_prob(path)  # type: ignore[arg-type,operator]

    def _log_prob(self, path: Flips) -> Tensor:
        horizon = path.ts[-1]
        ends = torch.cat([torch.zeros_like(path.jumps[..., :1]), path.jumps.clamp(max=float(horizon))], -1)
        dwell = torch.cat([ends[..., 1:] - ends[..., :-1], (horizon - ends[..., -1:])], -1)
        state = (path.start.unsqueeze(-1) + torch.arange(dwell.shape[-1])) % 2
        leave = torch.where(state == 0, self.up, self.down)
        happened = torch.isfinite(path.jumps)
        jumps = torch.where(happened, leave[..., :-1].log(), 0.0).sum(-1)
        first = torch.where(path.start == 1, self.start.log(), (1 - self.start).log())
        return first + jumps - (leave * dwell).sum(-1)

    def rates(self, t) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.stack([torch.stack([-self.up, self.up]), torch.stack([self.down, -self.down])])
