"""Bridge matching: Schrödinger bridges by regression of drifts, for dimensions in which transport kernels fail."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stochdyn._checks import check_choice, check_finite, check_positive, check_positive_int, check_time_grid
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.matching_network import IntervalDrift
from stochdyn.core.gaussian.pinned import bridge_coefficients, bridge_drift
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.core.transport.entropic import sinkhorn, squared_distance
from stochdyn.errors import DiffusionError, InvalidInputError, TimeGridError
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.run.randomness import fork_random_state, seed_everything
from stochdyn.run.result import FitResult

__all__ = ["BridgeMatching"]

_EDGE = 1e-3
# bridges drawn through each pair for the affine part, and the longest memory of earlier ones
_REPEATS, _KEEP = 4, 0.9
_LAST_RENEWALS = 10


class BridgeMatching(Objective):
    r"""Multi-marginal Schrödinger bridge under a Brownian or Ornstein-Uhlenbeck reference, by matching drifts.

    On each interval a coupling of its two snapshots is joined by bridges of the reference, and networks regress the drift of
    that mixture, forward and backward in time (the Markovian projection). Following the networks gives new couplings
    that are nearer to the bridge's, and so on:

    .. math:: b(t,x)=E[\,b^{bridge}(t,x;X_{t_{i+1}})\mid X_t=x\,].

    The only fixed point is the Schrödinger bridge. Training goes on in both directions at once: the forward network learns from
    pairs whose *end* is data, the backward one from pairs whose *start* is, so errors in a marginal don't pile up. A cache
    of pairs is part of the state, so an interrupted :func:`stochdyn.fit` continues to the same bits. Memory and time grow
    linearly in the numbers of particles and of dimensions; where a snapshot has some thousand particles in a few dimensions,
    :class:`~stochdyn.bridges.laws.schrodinger.SchrodingerBridge` is faster and exact.

    Args:
        snapshots: what the bridge passes through.
        diffusion: :math:`\sigma` of the reference, in units of state per root of time.
        rate: mean reversion of the reference, in 1/time; zero for Brownian motion.
        mean: of the reference, a number or ``(d,)``.
        width: of the networks' hidden layers; zero for drifts that are affine in the state, enough for Gaussians.
        num_pairs: size of the cache for each interval and direction.
        batch_size: pairs of each interval and direction in a step.
        refresh: steps between renewals of the cache.
        sim_steps: steps of the simulation of an interval (Heun's method).
        start: first coupling: ``"independent"``, or ``"sinkhorn"`` of random minibatches of 512.

    Raises:
        DiffusionError: if the diffusion isn't positive.
        InvalidInputError: for sizes that aren't positive, or an unknown start.

    Example:
        >>> snaps = Snapshots([0.0, 1.0], [torch.randn(200, 2), 1 + torch.randn(200, 2)])
        >>> match = BridgeMatching(snaps, diffusion=1.0, width=0, num_pairs=200, batch_size=64, refresh=20)
        >>> match.fit(steps=40, progress=False).bound
        'surrogate'
        >>> match.sample(torch.linspace(0, 1, 5), 10).shape
        torch.Size([10, 5, 2])

    Reference: Shi, De Bortoli, Campbell & Doucet (2023), Diffusion Schrödinger bridge matching; De Bortoli,
    Korshunova, Mnih & Doucet (2024), Schrödinger bridge flow (training online); Peluchetti (2023), Diffusion bridge
    mixture transports.
    """

    duration: Tensor
    mean: Tensor
    pairs: Tensor
    calls: Tensor

    def __init__(
        self,
        snapshots: Snapshots,
        diffusion: float,
        rate: float = 0.0,
        mean: Tensor | float = 0.0,
        *,
        width: int = 128,
        num_pairs: int = 4096,
        batch_size: int = 512,
        refresh: int = 100,
        sim_steps: int = 30,
        start: str = "independent",
    ) -> None:
        super().__init__()
        check_positive(diffusion, "diffusion", DiffusionError)
        check_positive_int(width, "width", 0)
        check_finite(torch.as_tensor(rate), "rate")
        sizes = {"num_pairs": num_pairs, "batch_size": batch_size, "refresh": refresh, "sim_steps": sim_steps}
        for name, size in sizes.items():
            check_positive_int(size, name)
        check_choice(start, ("independent", "sinkhorn"), "start")
        self.snapshots = snapshots
        self.diffusion, self.rate = float(diffusion), float(rate)
        self.num_pairs, self.batch_size = num_pairs, batch_size
        self.refresh, self.sim_steps = refresh, sim_steps
        self.start = start
        self.num_intervals, self.dim = len(snapshots) - 1, snapshots.dim
        like = snapshots.samples[0]
        everything, centre, scale = snapshots.standardised()
        del everything
        self.register_buffer("duration", snapshots.durations.to(like).reshape(-1, 1, 1))
        self.register_buffer("mean", torch.as_tensor(mean).to(like).expand(self.dim).clone())
        self.forward_net = IntervalDrift(self.num_intervals, centre, scale, width)
        self.backward_net = IntervalDrift(self.num_intervals, centre, scale, width)
        empty = like.new_zeros(2, 2, self.num_intervals, num_pairs, self.dim)
        self.register_buffer("pairs", empty)  # direction trained, end, interval, pair, component
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate the regression of both networks on a batch of the cache, which is renewed in turn."""
        count = int(self.calls)
        if count % self.refresh == 0:
            self.renew(first=count == 0)
        self.calls += 1
        pick = torch.randint(self.num_pairs, (self.batch_size,), device=self.pairs.device)
        ahead = self._loss(0, pick)
        back = self._loss(1, pick)
        terms = {"forward": ahead.detach(), "backward": back.detach()}
        return ObjectiveValue(ahead + back, terms, "surrogate")

    def _loss(self, direction: int, pick: Tensor) -> Tensor:
        s, x, target = self._bridges(direction, pick)
        net = self.forward_net if direction == 0 else self.backward_net
        return ((1 - s) * (net(s, x) - target).square()).mean()

    def _bridges(self, direction: int, pick: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the bridges between chosen pairs, run in the direction of the network, and its targets.

        The variance of a target grows as the inverse of the time that remains, which is its weight therefore.
        """
        net = self.forward_net if direction == 0 else self.backward_net
        ends = self.pairs[direction][:, :, pick]
        begin, goal = (ends[0], ends[1]) if direction == 0 else (ends[1], ends[0])
        order = torch.arange(pick.shape[0], dtype=begin.dtype, device=begin.device)
        s = (order + torch.rand_like(order)) / pick.shape[0]  # stratified; the pairs are in random order
        s = (s * (1 - _EDGE)).reshape(1, -1, 1)
        elapsed, remaining = s * self.duration, (1 - s) * self.duration
        rate = s.new_tensor(self.rate)
        first, last, variance = bridge_coefficients(rate, elapsed, remaining)
        x = self.mean + first * (begin - self.mean) + last * (goal - self.mean)
        x = x + self.diffusion * variance.sqrt() * torch.randn_like(begin)
        pull = bridge_drift(rate, remaining, x - self.mean, goal - self.mean)
        return s, x, (pull - self.rate * (self.mean - x)) * self.duration / net.scale

    @torch.no_grad()
    def renew(self, first: bool = False) -> None:
        """Draw new pairs, data at one end and what the networks make of it at the other; refit the affine parts."""
        if first:
            for i in range(self.num_intervals):
                x, y = self._first_pairs(i)
                self.pairs[:, 0, i], self.pairs[:, 1, i] = x, y
        else:
            starts = torch.stack([s.draw(self.num_pairs) for s in list(self.snapshots)[:-1]])
            ends = torch.stack([s.draw(self.num_pairs) for s in list(self.snapshots)[1:]])
            # the backward network's pairs train the forward one, and the other way round
            self.pairs[0, 0], self.pairs[0, 1] = self._run(1, ends)[-1], ends
            self.pairs[1, 0], self.pairs[1, 1] = starts, self._run(0, starts)[-1]
        renewals = int(self.calls) // self.refresh
        for direction, net in enumerate((self.forward_net, self.backward_net)):
            net.forget(min(_KEEP, renewals / (renewals + 3)))
            for _ in range(_REPEATS):
                order = torch.randperm(self.num_pairs, device=self.pairs.device)
                s, x, target = self._bridges(direction, order)
                net.observe(s, x, target, 1 - s)
            net.refit()

    def _first_pairs(self, i: int) -> tuple[Tensor, Tensor]:
        before, after = self.snapshots[i], self.snapshots[i + 1]
        x, y = before.draw(self.num_pairs), after.draw(self.num_pairs)
        if self.start == "independent":
            return x, y
        reg = 2 * self.diffusion**2 * float(self.duration[i])
        for k in range(0, self.num_pairs, 512):
            a, b = x[k : k + 512], y[k : k + 512]
            plan = sinkhorn(None, None, reg, cost=squared_distance(a, b), tolerance=1e-3)
            rows = plan.plan()
            y[k : k + 512] = b[torch.multinomial(rows / rows.sum(1, keepdim=True), 1)[:, 0]]
        return x, y

    def _run(
        self,
        direction: int,
        x: Tensor,
        interval: int | None = None,
        clock: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Follow a network over whole intervals, or over ``clock (T,)`` in ``[0, 1]`` of one: ``(T, I, n, d)``."""
        net = self.forward_net if direction == 0 else self.backward_net
        rows = slice(None) if interval is None else slice(interval, interval + 1)
        span = self.duration[rows]
        if interval is not None:
            x = x.unsqueeze(0)

        def drift(s: Tensor, z: Tensor) -> Tensor:
            if interval is not None:  # the network knows all intervals at once
                z = z.expand(self.num_intervals, -1, -1)
            value = net(s, z)[rows] * net.scale
            return value + span * self.rate * (self.mean - z[rows])

        spread = self.diffusion * span.sqrt()
        sde = SDE(drift, Diagonal(spread.expand(-1, 1, self.dim)))
        grid = torch.linspace(0, 1, self.sim_steps + 1, dtype=torch.float64, device=x.device)
        if clock is not None:
            grid = torch.cat((grid, clock)).unique()
        dw, _ = draw_increments(sde, x, grid, generator)
        path = integrate(sde, x, grid, dw, method="heun").x
        return path if clock is None else path[torch.searchsorted(grid, clock)]

    def fit(
        self,
        steps: int = 3000,
        lr: float = 2e-3,
        seed: int | None = 0,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **options: Any,
    ) -> FitResult:
        """Train by :func:`stochdyn.fit` with a learning rate that falls to nothing, and keep the average weights.

        Args:
            steps: of training.
            lr: first learning rate.
            seed: of training.
            progress: show a bar.
            checkpoint: directory; see :func:`stochdyn.fit`.
            resume: continue the run that is there.
            options: further arguments of :func:`stochdyn.fit`.

        Returns:
            The :class:`~stochdyn.run.result.FitResult`.
        """
        from stochdyn.run.trainer import fit

        if not list(self.parameters()):
            return self._fit_affine(steps, seed, progress)

        def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        defaults = {"scheduler": schedule, "ema": 0.99, "clip_norm": 10.0}
        result = fit(
            self, steps=steps, lr=lr, seed=seed, progress=progress, checkpoint=checkpoint, resume=resume,
            **{**defaults, **options},
        )  # fmt: skip
        if result.ema is not None:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(result.ema[name])
        if not result.interrupted:
            # the affine parts belong to the last weights of the networks, not to their average
            with fork_random_state(seed, self.pairs.device):
                for _ in range(_LAST_RENEWALS):
                    self.renew()
        return result

    def _fit_affine(self, steps: int, seed: int | None, progress: bool) -> FitResult:
        """Without networks there is nothing to train: only couplings and affine parts are renewed in turn."""
        began, losses = time.perf_counter(), []
        with fork_random_state(seed, self.pairs.device):
            if seed is not None:
                seed_everything(seed, self.pairs.device)
            for _ in tqdm(range(-(-steps // self.refresh)), disable=not progress):
                losses.append(self(None).loss)
                self.calls += self.refresh - 1
        return FitResult(torch.stack(losses).cpu(), self, time.perf_counter() - began, steps=len(losses))

    def _owner(self, t: float) -> tuple[int, float]:
        times = self.snapshots.times
        low, high = float(times[0]), float(times[-1])
        if not low - 1e-9 <= t <= high + 1e-9:
            raise TimeGridError("t must lie within the snapshots", got=t, expected=f"[{low:g}, {high:g}]")
        i = (
            int(torch.searchsorted(times, torch.tensor(t, dtype=times.dtype)).clamp(1, self.num_intervals))
            - 1
        )
        return i, min(max((t - float(times[i])) / float(times[i + 1] - times[i]), 0.0), 1.0)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the learned drift ``(..., d)`` at one time ``t`` (at a snapshot that of the interval before it)."""
        clock = torch.as_tensor(t)
        if clock.numel() != 1:
            raise InvalidInputError("t must be one time", got=f"shape {tuple(clock.shape)}")
        i, s = self._owner(float(clock))
        flat = x.reshape(1, -1, self.dim).expand(self.num_intervals, -1, -1)
        value = self.forward_net(flat.new_tensor(s), flat)[i] * self.forward_net.scale / self.duration[i]
        return value.reshape(x.shape) + self.rate * (self.mean - x)

    @torch.no_grad()
    def couple(
        self, interval: int, n: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs ``(n, d)``, ``(n, d)`` of neighbouring snapshots' states, by the forward network.

        Args:
            interval: which, from 0.
            n: how many.
            generator: source of randomness.
        """
        check_positive_int(n, "n")
        if not 0 <= interval < self.num_intervals:
            raise InvalidInputError(
                "there is no such interval", got=interval, expected=f"0 to {self.num_intervals - 1}"
            )
        x = self.snapshots[interval].draw(n, generator)
        return x, self._run(0, x, interval, generator=generator)[-1, 0]

    @torch.no_grad()
    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` trajectories ``(n, T, d)`` at ``ts (T,)`` from the first snapshot on, by the forward networks."""
        check_time_grid(ts, min_points=1)
        check_positive_int(n, "n")
        places = [self._owner(t) for t in ts.tolist()]
        x = self.snapshots[0].draw(n, generator)
        parts = []
        for i in range(places[-1][0] + 1):
            inside = [s for k, s in places if k == i]
            clock = torch.tensor([*inside, 1.0], dtype=torch.float64, device=x.device)
            path = self._run(0, x, i, clock, generator)[:, 0]
            parts.append(path[:-1])
            x = path[-1]
        return torch.cat(parts).movedim(0, 1)
