"""Iterative proportional fitting with regressed drifts: the published solver, for comparison."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_seed,
    check_bool,
    check_choice,
    check_positive,
    check_positive_int,
    check_type,
)
from stochdyn._lending import lent
from stochdyn._transforms import recording
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws.learned import LearnedBridge
from stochdyn.bridges.laws.nodes import DriftNodes
from stochdyn.bridges.laws.reference import EmpiricalLaw, as_reference, default_diffusion, spread_of
from stochdyn.core._distance import distance_between
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.networks import MLP
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import UnavailableError

__all__ = ["DriftRegression", "GaussianProcessDrift", "IPFBridge", "NetworkDrift"]

Field = Callable[[Tensor, Tensor], Tensor]


class DriftRegression(nn.Module, ABC):
    """A drift learnt from noisy increments."""

    @abstractmethod
    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """Learn from rates ``(N, d)`` at times ``(N, 1)`` and states ``(N, d)``, of variance ``noise`` per component."""

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` at one time and states ``(n, d)``."""


class GaussianProcessDrift(DriftRegression):
    r"""Mean of an exact Gaussian process on time and state, with the kernel :math:`s^2e^{-r/\ell}` and no tuning.

    States and times are measured in standard deviations of those that it is fitted to, so that the answer doesn't depend on units.

    Args:
        lengthscale: The length scale :math:`\ell` of the kernel, in these standard deviations.
        variance: The prior variance :math:`s^2`, in squared units of the drift; the mean square of the rates that it is fitted
            to if None.
        mean: The prior mean, a function of times and states such as the reference's drift; zero if None.

    Reference: Vargas, Thodoroff, Lamacraft & Lawrence (2021), Solving Schrödinger bridges via maximum likelihood.
    """

    inputs: Tensor
    weights: Tensor
    centre: Tensor
    scale: Tensor
    strength: Tensor

    def __init__(
        self, lengthscale: float = 3.0, variance: float | None = None, mean: Field | None = None
    ) -> None:
        super().__init__()
        check_positive(lengthscale, "lengthscale")
        if variance is not None:
            check_positive(variance, "variance")
        self.lengthscale, self.variance, self.mean = lengthscale, variance, mean

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        distance = distance_between(first, second)
        return self.strength * torch.exp(-distance / self.lengthscale)

    def _standard(self, t: Tensor, x: Tensor) -> Tensor:
        return (torch.cat((x, t), -1) - self.centre) / self.scale

    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """Learn the drift from rates ``(N, d)`` at times ``(N, 1)`` and states ``(N, d)``."""
        _register_units(self, t, x)
        target = rate if self.mean is None else rate - self.mean(t, x)
        strength = target.square().mean() if self.variance is None else target.new_tensor(self.variance)
        self.register_buffer("strength", strength.clamp_min(torch.finfo(x.dtype).tiny))
        self.register_buffer("inputs", self._standard(t, x))
        # the mean of the Gaussian process: k(x, X) (K + noise I)^{-1} (rates - prior mean)
        kernel = self._kernel(self.inputs, self.inputs)
        kernel.diagonal().add_(noise + 1e-6 * self.strength)
        self.register_buffer("weights", torch.cholesky_solve(target, torch.linalg.cholesky(kernel)))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` at states ``(n, d)``."""
        clock = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        out = self._kernel(self._standard(clock, x), self.inputs) @ self.weights
        return out if self.mean is None else out + self.mean(clock, x)


class NetworkDrift(DriftRegression):
    """A network fitted by Adam on all increments, in standard deviations of its inputs and targets.

    Args:
        dim: The number of components of the state.
        width: The width of the two hidden layers.
        steps: The number of steps of Adam.
        lr: The learning rate of Adam.
        mean: The function of times and states that is added to the network; zero if None.
    """

    centre: Tensor
    scale: Tensor
    size: Tensor

    def __init__(
        self, dim: int, width: int = 64, steps: int = 200, lr: float = 1e-2, mean: Field | None = None
    ) -> None:
        super().__init__()
        check_positive_int(steps, "steps")
        check_positive(lr, "lr")
        self.net = MLP((dim + 1, width, width, dim), zero_last=True)
        self.steps, self.lr, self.mean = steps, lr, mean

    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """Learn the drift from rates ``(N, d)`` at times ``(N, 1)`` and states ``(N, d)``."""
        self.net.to(x)
        _register_units(self, t, x)
        inputs = (torch.cat((x, t), -1) - self.centre) / self.scale
        target = rate if self.mean is None else rate - self.mean(t, x)
        spread = target.std()
        self.register_buffer("size", torch.where(spread > 0, spread, torch.ones_like(spread)))
        optimizer = torch.optim.Adam(self.net.parameters(), self.lr)
        with recording():
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = (self.net(inputs) - target / self.size).square().mean()
                loss.backward()
                optimizer.step()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` at states ``(n, d)``."""
        clock = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        out = self.size * self.net((torch.cat((x, clock), -1) - self.centre) / self.scale)
        return out if self.mean is None else out + self.mean(clock, x)


def _register_units(drift: DriftRegression, t: Tensor, x: Tensor) -> None:
    inputs = torch.cat((x, t), -1)
    scale = inputs.std(0)
    drift.register_buffer("centre", inputs.mean(0))
    drift.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))


class IPFBridge(LearnedBridge):
    r"""The bridge by alternating half-bridges whose drifts are regressed on simulated increments.

    From the reference run forward, a backward drift is regressed; run backward from the later snapshot, a forward drift; and so
    on. Each half step costs a regression on all increments, cubic in their number for a Gaussian process, and far
    displacements need many sweeps: :class:`~stochdyn.bridges.laws.schrodinger.SchrodingerBridge` gives the same bridge exactly wherever the
    transition density is known.

    Paths follow Euler's scheme of the regressed drifts from the first snapshot on, and between its times the conditional law that
    the scheme has there, so that the law doesn't depend on the times that are asked for.

    Use it for comparison with published results.

    Args:
        snapshots: The snapshots to pass through.
        reference: The drift of the reference, as for :class:`~stochdyn.bridges.SchrodingerBridge`.
        diffusion: The noise of the reference, one number for all components.
        dt: The step of Euler's scheme; a twenty-fifth of the shortest interval if None.
        max_iterations: The number of pairs of half steps.
        learner: The way in which drifts are regressed: ``"gp"``, ``"neural"``, or a function that makes a
            :class:`DriftRegression`.
        prior_mean: Whether drifts are regressed as deviations from the reference's (not as published).
        seed: The seed of the simulations and of the networks.

    Reference: Vargas et al. (2021), algorithm 2; Shen, Berlinghieri & Broderick (2025), section 4.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        reference: Any = None,
        diffusion: Any = None,
        *,
        dt: float | None = None,
        max_iterations: int = 10,
        learner: str | Callable[[], DriftRegression] = "gp",
        prior_mean: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_type(snapshots, Snapshots, "snapshots")
        check_positive_int(max_iterations, "max_iterations")
        check_bool(prior_mean, "prior_mean")
        if dt is not None:
            check_positive(dt, "dt")
        if not callable(learner):
            check_choice(learner, ("gp", "neural"), "learner")
        family, own = as_reference(reference, snapshots)
        self.snapshots = snapshots
        self.family: DriftFamily = ZeroDrift(snapshots.dim) if family is None else family
        given = diffusion if diffusion is not None else own
        self.diffusion: Coefficient | Tensor | float = (
            default_diffusion(snapshots) if given is None else given
        )
        self.register_buffer("spread", spread_of(self.diffusion, snapshots))
        self.spread: Tensor
        self.sigma = float(self.spread.diagonal().mean().sqrt())
        if not torch.allclose(self.spread, self.sigma**2 * torch.eye(snapshots.dim).to(self.spread)):
            raise UnavailableError("this solver needs noise of one strength", hint="use SchrodingerBridge")
        self.dt = float(snapshots.durations.min()) / 25 if dt is None else float(dt)
        self.max_iterations, self.learner, self.prior_mean = max_iterations, learner, prior_mean
        self.seed = as_seed(seed)
        self.forward_drifts, self.backward_drifts = nn.ModuleList(), nn.ModuleList()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IPFBridge:
        super()._apply(fn, recurse)
        self.snapshots = self.snapshots.to(self.spread.dtype, self.spread.device)
        return self

    def _new(self) -> DriftRegression:
        if callable(self.learner):
            return self.learner()
        mean = self.family if self.prior_mean else None
        if self.learner == "gp":
            return GaussianProcessDrift(mean=mean)
        return NetworkDrift(self.snapshots.dim, mean=mean)

    def _grid(self, i: int) -> Tensor:
        start, end = self.snapshots.times[i : i + 2].tolist()
        steps = max(2, math.ceil((end - start) / self.dt - 1e-9))
        return torch.linspace(start, end, steps + 1, dtype=torch.float64)

    def _run(self, drift: Field, x: Tensor, ts: Tensor, generator: torch.Generator | None) -> Tensor:
        """Euler's scheme along ``ts``, in whichever direction it runs; ``(T, n, d)``."""
        path = [x]
        for t, dt in zip(ts[:-1], ts.diff(), strict=True):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            size = abs(float(dt))
            moved = path[-1] + size * drift(t.to(x), path[-1])
            path.append(moved + self.sigma * math.sqrt(size) * noise)
        return torch.stack(path)

    def _regress(self, path: Tensor, ts: Tensor) -> DriftRegression:
        """Learn the drift of the reversed path; ``ts`` are the times of ``path``."""
        # the reversed path's increments over their durations have the backward drift for mean, and variance sigma^2 / h
        states, clock = path.flip(0), ts.flip(0)
        size = ts.diff().abs().to(path)[:, None, None].flip(0)
        rate = states.diff(dim=0) / size
        t = clock[:-1].to(path)[:, None, None].expand(*rate.shape[:-1], 1)
        drift = self._new()
        flat = (t.reshape(-1, 1), states[:-1].reshape(-1, path.shape[-1]), rate.reshape(-1, path.shape[-1]))
        drift.fit(*flat, noise=self.sigma**2 / float(size.mean()))
        return drift

    @torch.no_grad()
    def solve(self) -> IPFBridge:
        """Run all sweeps; returns this bridge."""
        generator = torch.Generator(self.snapshots.device).manual_seed(self.seed)
        with lent(self.seed):  # weights of networks
            self.forward_drifts, self.backward_drifts = nn.ModuleList(), nn.ModuleList()
            for i in range(len(self.snapshots) - 1):
                ts, (x, y) = self._grid(i), self.snapshots.samples[i : i + 2]
                backward = self._regress(self._run(self.family, x, ts, generator), ts)
                for _ in range(self.max_iterations):
                    forward = self._regress(self._run(backward, y, ts.flip(0), generator), ts.flip(0))
                    backward = self._regress(self._run(forward, x, ts, generator), ts)
                self.forward_drifts.append(forward)
                self.backward_drifts.append(backward)
        return self

    def _check_solved(self) -> None:
        if not len(self.forward_drifts):
            raise UnavailableError("the bridge isn't solved yet", hint="call solve() first")

    @torch.no_grad()
    def stitched(self, generator: torch.Generator | int | None = None) -> tuple[Tensor, Tensor]:
        """Return whole trajectories through every particle: forward from its snapshot, and backward from it.

        Returns:
            Times ``(T,)`` and states ``(n, T, d)``, ``n`` the number of all particles.
        """
        self._check_solved()
        generator = as_generator(generator, self.snapshots.device)
        grids = [self._grid(i) for i in range(len(self.snapshots) - 1)]
        ts = torch.cat([grids[0][:1], *(grid[1:] for grid in grids)])
        paths = []
        for i, cloud in enumerate(self.snapshots.samples):
            before: list[Tensor] = []
            after = [cloud[None]]
            state = cloud
            for j in range(i, len(grids)):
                part = self._run(self.forward_drifts[j], state, grids[j], generator)
                after.append(part[1:])
                state = part[-1]
            state = cloud
            for j in reversed(range(i)):
                part = self._run(self.backward_drifts[j], state, grids[j].flip(0), generator)
                before.insert(0, part[1:].flip(0))
                state = part[-1]
            paths.append(torch.cat([*before, *after]))
        return ts, torch.cat(paths, 1).movedim(0, 1)

    def _paths(
        self, ts: Tensor, x: Tensor, generator: torch.Generator | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        times = self.snapshots.times
        clock, noise = ts.double().tolist(), torch.zeros_like(x)
        slack = 1e-9 * float(times[-1] - times[0])
        states, sums = [], []
        while clock and clock[0] <= float(times[0]) + slack:
            states.append(x)
            sums.append(noise)
            clock.pop(0)
        for i, drift in enumerate(self.forward_drifts):
            for start, end in itertools.pairwise(self._grid(i).tolist()):
                if not clock:
                    break
                rate = drift(torch.as_tensor(start, dtype=x.dtype, device=x.device), x)
                moved = _gaussian(x, math.sqrt(end - start), generator)
                at, gone = start, torch.zeros_like(x)
                # between its times Euler's scheme is a Brownian motion with drift, pinned at what has been drawn
                while clock and clock[0] < end - slack:
                    t = clock.pop(0)
                    share = (t - at) / (end - at)
                    bridge = math.sqrt(max((t - at) * (end - t) / (end - at), 0.0))
                    gone = gone + share * (moved - gone) + _gaussian(x, bridge, generator)
                    at = t
                    states.append(x + (t - start) * rate + self.sigma * gone)
                    sums.append(noise + gone)
                x, noise = x + (end - start) * rate + self.sigma * moved, noise + moved
                if clock and clock[0] <= end + slack:
                    clock.pop(0)
                    states.append(x)
                    sums.append(noise)
        return states, sums

    @torch.no_grad()
    def _learnt_drift(self, backward: bool, i: int, time: float, x: Tensor) -> Tensor:
        return (self.backward_drifts if backward else self.forward_drifts)[i](
            torch.as_tensor(time, dtype=x.dtype, device=x.device), x
        )

    def nodes(self, num_nodes: int = 1_000_000, generator: torch.Generator | int | None = None) -> DriftNodes:
        """Return increments of stitched trajectories as targets for the projection, noise and all."""
        check_positive_int(num_nodes, "num_nodes")
        source = as_generator(generator, self.snapshots.device)
        ts, paths = self.stitched(source)
        if paths.shape[0] * paths.shape[1] > num_nodes:
            kept = max(1, num_nodes // paths.shape[1])
            paths = paths[torch.randperm(len(paths), generator=source, device=paths.device)[:kept]]
        dt = ts.diff().to(paths)[:, None]
        rate, dim = paths.diff(dim=1) / dt, paths.shape[-1]
        t = ts[:-1].to(paths)[:, None].expand(*rate.shape[:-1], 1)
        weight = (dt[:, 0] / len(paths)).expand(rate.shape[:-1])
        return DriftNodes(
            t.reshape(-1, 1), paths[:, :-1].reshape(-1, dim), rate.reshape(-1, dim), weight.reshape(-1)
        )

    @torch.no_grad()
    def divergence(self, generator: torch.Generator | int | None = None, num_samples: int = 2000) -> Tensor:
        r"""Return :math:`\tfrac12\sigma^{-2}\,E\int|b_q-b|^2dt`, the divergence of the forward process from the reference."""
        self._check_solved()
        generator = as_generator(generator, self.snapshots.device)
        total = torch.zeros((), dtype=torch.float64)
        for i, drift in enumerate(self.forward_drifts):
            ts = self._grid(i)
            start = self.snapshots[i].draw(min(num_samples, len(self.snapshots[i])), generator)
            path = self._run(drift, start, ts, generator)
            for t, dt, x in zip(ts[:-1], ts.diff(), path[:-1], strict=True):
                # Girsanov's divergence of one step: h |b_q - b|^2 / (2 sigma^2)
                gap = drift(t.to(x), x) - self.family(t.to(x), x)
                total += 0.5 * float(dt) / self.sigma**2 * gap.square().sum(-1).double().mean()
        return total

    @property
    def reference(self) -> DiffusionMeasure:
        """The reference process, started from the first snapshot's particles."""
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(self.family, self.diffusion))


def _gaussian(like: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    return scale * torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
