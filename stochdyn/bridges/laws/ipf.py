"""Iterative proportional fitting with regressed drifts: the published solver, for comparison and for dimensions without kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_choice, check_inside, check_positive, check_positive_int, check_time_grid
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily, ZeroDrift
from stochdyn.bridges.laws.marginal import BridgeMarginal
from stochdyn.bridges.laws.nodes import DriftNodes
from stochdyn.bridges.laws.reference import EmpiricalLaw, as_reference, spread_of
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.networks import MLP
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import UnavailableError

__all__ = ["DriftRegression", "GaussianProcessDrift", "IPFBridge", "NetworkDrift"]

Field = Callable[[Tensor, Tensor], Tensor]


class DriftRegression(nn.Module, ABC):
    """A drift learnt from noisy increments."""

    @abstractmethod
    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """Learn from rates ``(N, d)`` at times ``(N, 1)`` and states ``(N, d)``, of variance ``noise`` a component."""


class GaussianProcessDrift(DriftRegression):
    r"""Mean of an exact Gaussian process on time and state, with the kernel :math:`s^2e^{-r/\ell}` and no tuning.

    Args:
        lengthscale: :math:`\ell`.
        variance: :math:`s^2`; the noise of the increments times the squared diffusion's inverse if None, as published.
        mean: prior mean, the reference's drift, say; zero if None.

    Reference: Vargas, Thodoroff, Lamacraft & Lawrence (2021), Solving Schrödinger bridges via maximum likelihood.
    """

    def __init__(
        self, lengthscale: float = 1.0, variance: float | None = None, mean: Field | None = None
    ) -> None:
        super().__init__()
        check_positive(lengthscale, "lengthscale")
        self.lengthscale, self.variance, self.mean = lengthscale, variance, mean

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        return self.scale * torch.exp(-distance / self.lengthscale)

    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """See :meth:`DriftRegression.fit`."""
        self.scale = noise if self.variance is None else self.variance
        self.inputs = torch.cat((x, t), -1)
        target = rate if self.mean is None else rate - self.mean(t, x)
        kernel = self._kernel(self.inputs, self.inputs)
        kernel.diagonal().add_(noise + 1e-6)
        self.weights = torch.cholesky_solve(target, torch.linalg.cholesky(kernel))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` at states ``(n, d)``."""
        clock = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        out = self._kernel(torch.cat((x, clock), -1), self.inputs) @ self.weights
        return out if self.mean is None else out + self.mean(clock, x)


class NetworkDrift(DriftRegression):
    """A network fitted by Adam on all increments.

    Args:
        dim: ``d``.
        width: of two hidden layers.
        steps: of Adam.
        lr: learning rate.
        mean: added to the network; zero if None.
    """

    def __init__(
        self, dim: int, width: int = 64, steps: int = 200, lr: float = 1e-2, mean: Field | None = None
    ) -> None:
        super().__init__()
        self.net = MLP((dim + 1, width, width, dim), zero_last=True)
        self.steps, self.lr, self.mean = steps, lr, mean

    def fit(self, t: Tensor, x: Tensor, rate: Tensor, noise: float) -> None:
        """See :meth:`DriftRegression.fit`."""
        self.net.to(x)
        inputs = torch.cat((x, t), -1)
        self.centre, self.scale = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
        target = rate if self.mean is None else rate - self.mean(t, x)
        self.size = target.std().clamp_min(1e-6)
        optimizer = torch.optim.Adam(self.net.parameters(), self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = (self.net((inputs - self.centre) / self.scale) - target / self.size).square().mean()
                loss.backward()
                optimizer.step()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(n, d)`` at states ``(n, d)``."""
        clock = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        out = self.size * self.net((torch.cat((x, clock), -1) - self.centre) / self.scale)
        return out if self.mean is None else out + self.mean(clock, x)


class IPFBridge(PathMeasure):
    r"""The bridge by alternating half-bridges whose drifts are regressed on simulated increments.

    From the reference run forward, a backward drift is regressed; run backward from the later snapshot, a forward drift; and so
    on. Each half step costs a regression on all increments, cubic in their number for a Gaussian process, and far
    displacements need many sweeps: :class:`~stochdyn.bridges.laws.schrodinger.SchrodingerBridge` gives the same bridge exactly wherever the
    transition density is known.

    Args:
        snapshots: what was seen.
        reference: as for :class:`~stochdyn.bridges.laws.schrodinger.SchrodingerBridge`.
        diffusion: a number.
        step: of the Euler scheme; a twenty-fifth of the shortest interval if None.
        sweeps: pairs of half steps.
        learner: ``"gp"``, ``"neural"``, or a function that makes a :class:`DriftRegression`.
        prior_mean: whether drifts are regressed as deviations from the reference's (not as published).
        seed: of the simulations.

    Reference: Vargas et al. (2021), algorithm 2; Shen, Berlinghieri & Broderick (2025), section 4.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        reference: Any = None,
        diffusion: Any = None,
        *,
        step: float | None = None,
        sweeps: int = 10,
        learner: str | Callable[[], DriftRegression] = "gp",
        prior_mean: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive_int(sweeps, "sweeps")
        if not callable(learner):
            check_choice(learner, ("gp", "neural"), "learner")
        family, own = as_reference(reference, snapshots)
        self.snapshots = snapshots
        self.family: DriftFamily = ZeroDrift(snapshots.dim) if family is None else family
        self.diffusion = diffusion if diffusion is not None else own if own is not None else 1.0
        self.spread = spread_of(self.diffusion, snapshots)
        self.sigma = float(self.spread.diagonal().mean().sqrt())
        if not torch.allclose(self.spread, self.sigma**2 * torch.eye(snapshots.dim).to(self.spread)):
            raise UnavailableError("this solver needs noise of one strength", hint="use SchrodingerBridge")
        self.step = float(snapshots.durations.min()) / 25 if step is None else float(step)
        check_positive(self.step, "step")
        self.sweeps, self.learner, self.prior_mean, self.seed = sweeps, learner, prior_mean, seed
        self.forward_drifts: list[DriftRegression] = []
        self.backward_drifts: list[DriftRegression] = []

    def _new(self) -> DriftRegression:
        if callable(self.learner):
            return self.learner()
        mean = self.family if self.prior_mean else None
        if self.learner == "gp":
            return GaussianProcessDrift(variance=1.0 / self.step, mean=mean)
        return NetworkDrift(self.snapshots.dim, mean=mean)

    def _grid(self, i: int) -> Tensor:
        start, end = self.snapshots.times[i : i + 2].tolist()
        steps = max(2, math.ceil((end - start) / self.step - 1e-9))
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
        devices: list[Any] = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)  # weights of networks
            self.forward_drifts, self.backward_drifts = [], []
            for i in range(len(self.snapshots) - 1):
                ts, (x, y) = self._grid(i), self.snapshots.samples[i : i + 2]
                backward = self._regress(self._run(self.family, x, ts, generator), ts)
                for _ in range(self.sweeps):
                    forward = self._regress(self._run(backward, y, ts.flip(0), generator), ts.flip(0))
                    backward = self._regress(self._run(forward, x, ts, generator), ts)
                self.forward_drifts.append(forward)
                self.backward_drifts.append(backward)
        return self

    def _solved(self) -> None:
        if not self.forward_drifts:
            raise UnavailableError("the bridge isn't solved yet", hint="call solve() first")

    @torch.no_grad()
    def stitched(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return whole trajectories through every particle: forward from its snapshot, and backward from it.

        Returns:
            Times ``(T,)`` and states ``(n, T, d)``, ``n`` the number of all particles.
        """
        self._solved()
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

    @torch.no_grad()
    def sample(
        self, ts: Tensor, sample_shape: tuple[int, ...] | int = (), generator: torch.Generator | None = None
    ) -> PathSample:
        """Draw trajectories by the forward drifts from the first snapshot, states between the solver's times interpolated."""
        self._solved()
        check_time_grid(ts)
        check_inside(ts, self.snapshots.times, "ts", "the snapshots")
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        count = max(torch.Size(shape).numel(), 1)
        state = self.snapshots[0].draw(count, generator)
        grids, states = [], [state[None]]
        for i, drift in enumerate(self.forward_drifts):
            grids.append(self._grid(i))
            part = self._run(drift, state, grids[-1], generator)
            states.append(part[1:])
            state = part[-1]
        own = torch.cat([grids[0][:1], *(grid[1:] for grid in grids)])
        path = _interpolate(own, torch.cat(states), ts.double()).movedim(0, 1)
        dw = torch.zeros_like(path[:, 1:])  # the driving noise of an interpolated path isn't known
        return PathSample(
            ts, path.reshape(*shape, *path.shape[1:]), dw.reshape(*shape, *dw.shape[1:]), {}, self
        )

    def marginal(self, t: float | Tensor, repeats: int = 5) -> BridgeMarginal:
        """Return the law at time ``t``: states of stitched trajectories, as the publication scores them."""
        generator = torch.Generator(self.snapshots.device).manual_seed(self.seed + 1)
        time = torch.tensor([float(t)], dtype=torch.float64)
        check_inside(time, self.snapshots.times, "t", "the snapshots")
        clouds = []
        for _ in range(repeats):
            ts, paths = self.stitched(generator)
            clouds.append(_interpolate(ts, paths.movedim(1, 0), time)[0])
        points = torch.cat(clouds)
        return BridgeMarginal(float(t), points, None, points.new_full((len(points),), 1.0 / len(points)))

    def nodes(self, count: int = 1_000_000, generator: torch.Generator | None = None) -> DriftNodes:
        """Return increments of stitched trajectories as targets for the projection, noise and all."""
        ts, paths = self.stitched(generator)
        dt = ts.diff().to(paths)[:, None]
        rate, dim = paths.diff(dim=1) / dt, paths.shape[-1]
        t = ts[:-1].to(paths)[:, None].expand(*rate.shape[:-1], 1)
        weight = (dt[:, 0] / len(paths)).expand(rate.shape[:-1])
        return DriftNodes(
            t.reshape(-1, 1), paths[:, :-1].reshape(-1, dim), rate.reshape(-1, dim), weight.reshape(-1)
        )

    @torch.no_grad()
    def divergence(self, generator: torch.Generator | None = None, count: int = 2000) -> Tensor:
        r"""Return :math:`\tfrac12\sigma^{-2}\,E\int|b_q-b|^2dt`, the divergence of the forward process from the reference."""
        self._solved()
        total = torch.zeros((), dtype=torch.float64)
        for i, drift in enumerate(self.forward_drifts):
            ts = self._grid(i)
            start = self.snapshots[i].draw(min(count, len(self.snapshots[i])), generator)
            path = self._run(drift, start, ts, generator)
            for t, dt, x in zip(ts[:-1], ts.diff(), path[:-1], strict=True):
                gap = drift(t.to(x), x) - self.family(t.to(x), x)
                total += 0.5 * float(dt) / self.sigma**2 * gap.square().sum(-1).double().mean()
        return total

    @property
    def reference(self) -> DiffusionMeasure:
        """The reference process, started from the first snapshot's particles."""
        return DiffusionMeasure(EmpiricalLaw.of(self.snapshots[0]), SDE(self.family, self.diffusion))

    def log_rn(self, path: PathSample, other: PathMeasure) -> Tensor:
        """Raise: densities are the business of the exact solver."""
        raise UnavailableError(
            "this solver knows no densities", hint="use SchrodingerBridge(...).as_diffusion()"
        )


def _interpolate(ts: Tensor, states: Tensor, wanted: Tensor) -> Tensor:
    """Interpolate ``states (T, n, d)`` linearly."""
    right = torch.searchsorted(ts, wanted).clamp(1, len(ts) - 1)
    share = ((wanted - ts[right - 1]) / (ts[right] - ts[right - 1])).clamp(0, 1).to(states)[:, None, None]
    return (1 - share) * states[right - 1] + share * states[right]
