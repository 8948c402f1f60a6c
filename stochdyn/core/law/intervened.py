"""The law of a diffusion in which something is done from a time on."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, as_tensor, as_time_grid, check_real, check_type
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, Marginal, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.intervention import Intervention

__all__ = ["IntervenedMeasure"]


class IntervenedMeasure(PathMeasure):
    """The law of paths that follow a diffusion up to a time, and the same diffusion under an intervention from there on.

    :meth:`stochdyn.DiffusionMeasure.do` makes one. It has no density with respect to the law without the intervention where a
    component is held.

    Args:
        law: The law without the intervention.
        intervention: What is done, and from when on.

    Example:
        >>> from stochdyn import SDE
        >>> law = DiffusionMeasure(torch.ones(2), SDE(lambda t, x: -x, 0.5), start_time=0.0)
        >>> held = law.do(Intervention(0.5, {0: 2.0}))
        >>> held.sample([0.0, 0.4, 0.5, 1.0], generator=0).x[1:, 0]
        tensor([1.0873, 2.0000, 2.0000])
    """

    def __init__(self, law: DiffusionMeasure, intervention: Intervention) -> None:
        super().__init__()
        check_type(law, DiffusionMeasure, "law")
        check_type(intervention, Intervention, "intervention")
        self.law, self.intervention = law, intervention
        self.after = intervention.equation(law.sde)

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths; at the time of the intervention itself held components have their values already."""
        like = self.law.initial.like()
        grid = as_time_grid(ts, like=like)
        shape, source = as_sample_shape(sample_shape), as_generator(generator, like.device)
        time = self.intervention.time(grid)
        early, late = grid[grid < time], grid[grid >= time]
        if not len(late):
            path = self.law.sample(grid, shape, source)
            return PathSample.of_states(grid, path.x, self)
        x = self._until(early, time, shape, source)
        start = self.intervention.set(x[..., -1, :])
        knots = torch.cat([time.reshape(1), late[late > time]])
        # A time before the law is one at which nothing was done yet.
        if not len(early) and bool(time < grid[0]):
            knots = grid if self.law.start_time is None else torch.cat([time.reshape(1), late])
        if len(knots) == 1:
            rest = start.unsqueeze(-2)
        else:
            onwards = DiffusionMeasure(start, self.after, dt=self.law.dt, method=self.law.method)
            rest = onwards.sample(knots, (), source).x
        rest = rest if len(knots) == len(late) else rest[..., 1:, :]
        return PathSample.of_states(grid, torch.cat([x[..., :-1, :], rest], -2), self)

    def _until(
        self, early: Tensor, time: Tensor, shape: tuple[int, ...], source: torch.Generator | None
    ) -> Tensor:
        """Return the states ``(*sample, *batch, T, d)`` before the intervention and at it."""
        if len(early):
            return self.law.sample(torch.cat([early, time.reshape(1)]), shape, source).x
        start = self.law.start_time
        if start is None or bool(torch.as_tensor(start, dtype=time.dtype) >= time):
            return self.law.initial.marginal().sample(shape, source).unsqueeze(-2)
        return self.law.marginal(time).sample(shape, source).unsqueeze(-2)

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law of the state at one time; see :meth:`stochdyn.PathMeasure.marginal`."""
        check_real(t, "t")
        before = self.law.marginal(t)
        time = torch.as_tensor(t, dtype=torch.float64)
        start = torch.as_tensor(0.0 if self.law.start_time is None else self.law.start_time, dtype=time.dtype)
        if time < self.intervention.time(time):
            return before
        if time == start:
            return SampledMarginal(
                lambda shape, source: self.intervention.set(self.law.initial.marginal().sample(shape, source))
            )
        # In as many steps as the law takes by itself.
        count = self.law._step_counts(torch.stack([start, time]), 1)[0]
        grid = torch.linspace(float(start.detach()), float(time.detach()), count + 1, dtype=torch.float64)
        return SampledMarginal(lambda shape, source: self.sample(grid, shape, source).x[..., -1, :])

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)``; see :meth:`stochdyn.PathMeasure.drift`."""
        before = self.law.drift(t, x)
        x = as_tensor(x, "x", like=self.law.initial.like())
        time = as_tensor(t, "t", like=x).to(x)
        begun = time >= self.intervention.time(time)
        return torch.where(begun, self.after.slope(time, x).expand_as(x), before)
