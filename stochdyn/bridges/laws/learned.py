"""What bridges whose drifts are learnt forward and backward in time have from them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, as_time_grid, check_inside, check_real
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.kernel_drift import at_times, mean_velocity, owner
from stochdyn.bridges.laws.reference import EmpiricalLaw
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.equation import SDE

__all__ = ["LearnedBridge"]


class LearnedBridge(PathMeasure):
    """A bridge with a learnt drift on each interval, one for each direction of time."""

    snapshots: Snapshots
    diffusion: Any

    @abstractmethod
    def _check_solved(self) -> None:
        """Raise unless the drifts have been learnt."""

    @abstractmethod
    def _learnt_drift(self, backward: bool, i: int, time: float, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` of interval ``i`` at one time, in its own direction of time."""

    @abstractmethod
    def _paths(
        self, ts: Tensor, x: Tensor, generator: torch.Generator | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return states ``(n, d)`` at every time, from ``x (n, d)`` at the first snapshot, and the driving noise up to it."""

    @torch.no_grad()
    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw trajectories by the forward drifts from the first snapshot.

        Args:
            ts: The times of the paths, ``(T,)``, within the span of the snapshots.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            Paths with ``x (*sample, T, d)`` and ``dw (*sample, T-1, d)``, the increments of the noise that drove them.
        """
        self._check_solved()
        times = self.snapshots.times
        wanted = as_time_grid(ts, min_points=1, like=times)
        check_inside(wanted, times, "ts", "the snapshots")
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.snapshots.device)
        start = self.snapshots[0].draw(torch.Size(shape).numel(), source)
        states, sums = self._paths(wanted, start, source)
        path, dw = torch.stack(states, 1), torch.stack(sums, 1).diff(dim=1)
        return PathSample(
            wanted, path.reshape(*shape, *path.shape[1:]), dw.reshape(*shape, *dw.shape[1:]), {}, self
        )

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law at time ``t``, by simulation."""
        self._check_solved()
        check_real(t, "t")
        time = torch.as_tensor(t, dtype=torch.float64).reshape(1)
        check_inside(time, self.snapshots.times, "t", "the snapshots")
        return SampledMarginal(lambda shape, generator: self.sample(time, shape, generator).x[..., 0, :])

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the learnt drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``; at a snapshot that of the interval after it."""
        self._check_solved()
        times = self.snapshots.times
        return at_times(
            self.snapshots,
            t,
            x,
            lambda time, own: self._learnt_drift(False, owner(times, time)[1], time, own),
        )

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the mean of the drifts forward and backward in time, the velocity of the density; see :meth:`SchrodingerBridge.velocity`."""
        self._check_solved()
        return mean_velocity(
            self.snapshots,
            t,
            x,
            lambda i, time, own: self._learnt_drift(False, i, time, own),
            lambda i, time, own: -self._learnt_drift(True, i, time, own),
        )

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the law as an SDE with the learnt drift, started from the first snapshot's particles."""
        self._check_solved()
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(self.drift, self.diffusion))

    def forward(self) -> FokkerPlanck:
        """Return the forward operator of the bridge as a diffusion."""
        self._check_solved()
        return FokkerPlanck(SDE(self.drift, self.diffusion))
