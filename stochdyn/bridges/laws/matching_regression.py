"""The regression behind bridge matching: its drift networks, its cache of pairs, and how pairs are renewed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._transforms import version_of
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.core._distance import squared_distance
from stochdyn.core.gaussian.pinned import bridge_coefficients, bridge_drift
from stochdyn.core.networks import MLP
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.solvers import draw_increments, integrate
from stochdyn.core.transport.entropic import sinkhorn
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.run.randomness import fork_random_state

__all__ = ["IntervalDrift", "MatchingRegression"]

_BASIS = 6
_EDGE = 1e-3
# bridges drawn through each pair for the affine part, and the longest memory of earlier ones
_REPEATS, _KEEP = 4, 0.9


class MatchingRegression(Objective):
    """The regression of both drift networks of :class:`~stochdyn.bridges.BridgeMatching` on bridges between pairs.

    The pairs that it learns from are a cache, which it renews by its own networks; they are part of its state.
    """

    duration: Tensor
    mean: Tensor
    pairs: Tensor
    calls: Tensor
    _derived_ = ("_known",)

    def __init__(
        self,
        snapshots: Snapshots,
        diffusion: float,
        rate: float,
        mean: Tensor | float,
        width: int,
        num_pairs: int,
        batch_size: int,
        refresh: int,
        num_steps: int,
        coupling: str,
    ) -> None:
        super().__init__()
        self.snapshots = snapshots
        self.diffusion, self.rate = float(diffusion), float(rate)
        self.num_pairs, self.batch_size = num_pairs, batch_size
        self.refresh, self.num_steps = refresh, num_steps
        self.coupling = coupling
        self.num_intervals, self.dim = len(snapshots) - 1, snapshots.dim
        like = snapshots.samples[0]
        _, centre, scale = snapshots.standardised()
        self.register_buffer("duration", snapshots.durations.to(like).reshape(-1, 1, 1))
        self.register_buffer(
            "mean", torch.as_tensor(mean, dtype=like.dtype, device=like.device).expand(self.dim).clone()
        )
        with fork_random_state(0, like.device):  # the seed of a training is all its randomness
            self.forward_net = IntervalDrift(self.num_intervals, centre, scale, width)
            self.backward_net = IntervalDrift(self.num_intervals, centre, scale, width)
        empty = like.new_zeros(2, 2, self.num_intervals, num_pairs, self.dim)
        self.register_buffer("pairs", empty)  # direction trained, end, interval, pair, component
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self._known = self.calls, version_of(self.calls), 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MatchingRegression:
        count = self._count()
        super()._apply(fn, recurse)
        self.snapshots = self.snapshots.to(self.pairs.dtype, self.pairs.device)
        self._known = self.calls, version_of(self.calls), count
        return self

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate the regression of both networks on a batch of the cache, which is renewed in turn."""
        count = self._count()
        if count % self.refresh == 0:
            self.renew(first=count == 0)
        self.calls += 1
        self._known = self.calls, version_of(self.calls), count + 1
        pick = torch.randint(self.num_pairs, (self.batch_size,), device=self.pairs.device)
        ahead = self._loss(0, pick)
        back = self._loss(1, pick)
        terms = {"forward": ahead.detach(), "backward": back.detach()}
        return ObjectiveValue(ahead + back, terms, "surrogate")

    def _count(self) -> int:
        """Return the number of calls; it is read off the device only if something else has changed it."""
        tensor, version, count = self._known
        return count if tensor is self.calls and version == version_of(tensor) != -1 else int(self.calls)

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
        # stratified; the pairs are in random order
        s = (order + torch.rand_like(order, memory_format=torch.contiguous_format)) / len(pick)
        s = (s * (1 - _EDGE)).reshape(1, -1, 1)
        elapsed, remaining = s * self.duration, (1 - s) * self.duration
        rate = s.new_tensor(self.rate)
        first, last, variance = bridge_coefficients(rate, elapsed, remaining)
        # X_t of the pinned reference is Gaussian: a mean that is linear in both ends, and a variance common to all components
        x = self.mean + first * (begin - self.mean) + last * (goal - self.mean)
        x = x + self.diffusion * variance.sqrt() * torch.randn_like(
            begin, memory_format=torch.contiguous_format
        )
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
        if self.coupling == "independent":
            return x, y
        reg = 2 * self.diffusion**2 * float(self.duration[i])
        for k in range(0, self.num_pairs, 512):
            a, b = x[k : k + 512], y[k : k + 512]
            plan = sinkhorn(None, None, reg, cost=squared_distance(a, b), tolerance=1e-3)
            rows = plan.plan()
            y[k : k + 512] = b[torch.multinomial(rows / rows.sum(1, keepdim=True), 1)[:, 0]]
        return x, y

    def drift(self, direction: int, i: int, s: float, x: Tensor) -> Tensor:
        """Return the learned drift ``(n, d)`` on interval ``i`` at the share ``s`` of it that has passed in the net's direction."""
        net = self.forward_net if direction == 0 else self.backward_net
        flat = x[None].expand(self.num_intervals, -1, -1)
        value = net(flat.new_tensor(s), flat)[i] * net.scale / self.duration[i]
        return value + self.rate * (self.mean - x)

    def _run(self, direction: int, x: Tensor) -> Tensor:
        """Follow a network over all whole intervals from ``x (I, n, d)``; returns ``(T, I, n, d)``."""
        net = self.forward_net if direction == 0 else self.backward_net

        def drift(s: Tensor, z: Tensor) -> Tensor:
            return net(s, z) * net.scale + self.duration * self.rate * (self.mean - z)

        grid = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64, device=x.device)
        sde = SDE(drift, Diagonal((self.diffusion * self.duration.sqrt()).expand(-1, 1, self.dim)))
        dw, _ = draw_increments(sde, x, grid, None)
        return integrate(sde, x, grid, dw, method="heun").x

    def follow(
        self, i: int, x: Tensor, clock: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Follow the forward network on interval ``i`` from ``x (n, d)``, on its own grid.

        Between its times paths are Brownian motions pinned at both, so that they don't depend on ``clock``, the ``(T,)`` increasing shares
        of the interval at which they are wanted.

        Returns:
            States ``(T, n, d)`` and the driving motion since the start of the interval ``(T, n, d)``, in units of time of the snapshots.
        """
        span = float(self.duration[i])

        def drift(s: Tensor, z: Tensor) -> Tensor:
            return self.drift(0, i, float(s), z) * span

        scale = self.diffusion * math.sqrt(span)
        sde = SDE(drift, scale)
        grid = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64, device=x.device)
        dw, _ = draw_increments(sde, x, grid, generator)
        path = integrate(sde, x, grid, dw, method="heun").x
        motion = torch.cat((torch.zeros_like(dw[:1]), dw.cumsum(0)))
        states, driven, at, last = [], [], -1, (0.0, x, motion[0])
        for s in clock.tolist():
            k = min(int(s * self.num_steps * (1 + 1e-12)), self.num_steps)
            if k != at:
                at, last = k, (float(grid[k]), path[k], motion[k])
            if k < self.num_steps and s > last[0]:
                # a Brownian bridge to the next time of the grid, drawn on from the last one that was wanted
                end = float(grid[k + 1])
                share = (s - last[0]) / (end - last[0])
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                away = math.sqrt(max((s - last[0]) * (end - s) / (end - last[0]), 0.0)) * noise
                state = last[1] + share * (path[k + 1] - last[1]) + scale * away
                last = (s, state, last[2] + share * (motion[k + 1] - last[2]) + away)
            states.append(last[1])
            driven.append(last[2] * math.sqrt(span))
        return torch.stack(states), torch.stack(driven)


class IntervalDrift(nn.Module):
    r"""Drifts on several intervals at once, in units of the data's scale over the interval's length.

    .. math:: v_i(s,x)=\sum_k\cos(k\pi s)\,(A_{ik}\hat x+c_{ik})+\mathrm{net}(\hat x,\cos(k\pi s),i),\qquad \hat x=(x-m)/\varsigma

    The affine part alone holds every bridge between Gaussians. It is fitted by least squares (:meth:`refit`); only the network, which
    starts as zero, is trained.

    Args:
        num_intervals: The number ``I`` of intervals.
        centre: The middle :math:`m` of the data, ``(d,)``.
        scale: The size :math:`\varsigma` of the data, ``(d,)``.
        width: The width of the two hidden layers; zero for the affine part alone.
    """

    centre: Tensor
    scale: Tensor
    affine: Tensor
    gram: Tensor
    moment: Tensor

    def __init__(self, num_intervals: int, centre: Tensor, scale: Tensor, width: int) -> None:
        super().__init__()
        dim = centre.shape[-1]
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        size = (dim + 1) * _BASIS
        self.register_buffer("affine", torch.zeros(num_intervals, size, dim).to(centre))
        self.register_buffer("gram", torch.zeros(num_intervals, size, size).to(centre))
        self.register_buffer("moment", torch.zeros(num_intervals, size, dim).to(centre))
        self.net: MLP | None = None
        if width:
            inputs = dim + _BASIS + (num_intervals if num_intervals > 1 else 0)
            self.net = MLP((inputs, width, width, dim), zero_last=True).to(centre)

    def forward(self, s: Tensor, x: Tensor) -> Tensor:
        """Return ``(I, n, d)`` for times ``s`` in ``[0, 1]``, broadcastable to ``(I, n, 1)``, and ``x (I, n, d)``."""
        state, basis = self._inputs(s, x)
        value = _lift(state, basis) @ self.affine
        return value if self.net is None else value + self._residual(state, basis)

    def _inputs(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        harmonics = torch.pi * torch.arange(_BASIS, dtype=x.dtype, device=x.device)
        return (x - self.centre) / self.scale, torch.cos(s.expand(*x.shape[:-1], 1) * harmonics)

    def _residual(self, state: Tensor, basis: Tensor) -> Tensor:
        assert self.net is not None
        parts = [state, basis]
        count = self.affine.shape[0]
        if count > 1:
            label = torch.eye(count, dtype=state.dtype, device=state.device)
            parts.append(label[:, None].expand(-1, state.shape[1], -1))
        return self.net(torch.cat(parts, -1))

    @torch.no_grad()
    def forget(self, keep: float) -> None:
        """Scale what :meth:`observe` has gathered by ``keep``."""
        self.gram.mul_(keep)
        self.moment.mul_(keep)

    @torch.no_grad()
    def observe(self, s: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """Gather what :meth:`refit` needs from points ``x (I, n, d)``, targets and weights ``(I, n, 1)``."""
        state, basis = self._inputs(s, x)
        lifted = _lift(state, basis)
        rest = target if self.net is None else target - self._residual(state, basis)
        weighted = (lifted * weight).mT
        self.gram += weighted @ lifted
        self.moment += weighted @ rest

    @torch.no_grad()
    def refit(self) -> None:
        """Set the affine part to the least-squares fit of what has been observed, given the network."""
        # normal equations of the affine part, with a ridge of a millionth of their mean diagonal
        gram = self.gram.double()
        ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
        self.affine.copy_(torch.linalg.solve(gram, self.moment.double()))


def _lift(state: Tensor, basis: Tensor) -> Tensor:
    lifted = torch.cat((state, torch.ones_like(state[..., :1])), -1)
    return (lifted.unsqueeze(-1) * basis.unsqueeze(-2)).flatten(-2)
