r"""Drifts of a bridge, forward and backward in time, and its rate of growth, from the potentials of its couplings.

Between two snapshots the density of a bridge factorises,

.. math:: q_t(x)\propto\varphi_t(x)\,h_t(x),\qquad \varphi_t(x)=\sum_a\pi_ae^{f_a+\alpha_a(t)}p(x\mid x_a),\qquad
    h_t(x)=\sum_b\pi_be^{g_b+\beta_b(t)}p(y_b\mid x),

so that the drift is :math:`b+GG^\top\nabla\log h`, that of the process run backward :math:`b-GG^\top\nabla\log\varphi`, both in
the direction of time, and their mean the velocity of the density.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_event_size, check_inside, check_time_broadcast
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.growth import Growth
from stochdyn.bridges.laws.linearised import Transition
from stochdyn.core.gaussian.batch_last import inverse, mm, mt, mv
from stochdyn.core.transport.entropic import TransportPlan

__all__ = ["Side", "at_times", "backward_drift", "forward_drift", "growth_rate", "mean_velocity", "owner"]

_CHUNK_NUMBERS = 2**22
# The least share of an interval between a time and its ends: at the ends themselves kernels are points.
_EDGE = 1e-6


class Side:
    """One interval of a bridge: its ends, its reference and its coupling."""

    def __init__(
        self, snapshots: Snapshots, i: int, part: Transition, plan: TransportPlan, growth: Growth | None
    ) -> None:
        self.part, self.growth = part, growth
        self.x, self.y = snapshots.samples[i : i + 2]
        self.log_phi = plan.weights_x.double().log() + plan.scaled_potentials[0]
        self.log_h = plan.weights_y.double().log() + plan.scaled_potentials[1]

    def share(self, time: float) -> float:
        """Return the place of a time in the interval, from 0 to 1."""
        return (time - self.part.start) / (self.part.end - self.part.start)

    def inside(self, time: float) -> float:
        """Return the time, or the nearest one that isn't at an end."""
        least = _EDGE * (self.part.end - self.part.start)
        return min(max(time, self.part.start + least), self.part.end - least)

    def logs(self, time: float) -> tuple[Tensor, Tensor]:
        r"""Return the log weights of the particles before and after in :math:`\varphi_t` and :math:`h_t`."""
        if self.growth is None:
            return self.log_phi, self.log_h
        rows, columns = self.growth.tilts(self.share(time))
        return self.log_phi + rows, self.log_h + columns

    def ahead(self, time: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares ``(n, m)`` of the later particles in what is to come, and the slopes towards them ``(d, n, m)``."""
        part, now = self.part, self.inside(time)
        rest = part.ts[part.ts > now + _EDGE * (part.end - part.start)]
        grid = torch.cat((part.ts.new_tensor([now]), rest if len(rest) else part.ts[-1:]))
        n, m, d = x.shape[0], self.y.shape[0], x.shape[1]
        first = x[:, None].expand(-1, m, -1).reshape(-1, d)
        second = self.y.expand(n, -1, -1).reshape(-1, d)
        chain = part.chain(first, second, grid)
        density = chain.log_density(first.mT, second.mT).reshape(n, m)
        # grad_x log N(y; Psi x + D, R) = Psi^T R^{-1} (y - Psi x - D)
        gap = second.mT - mv(chain.to_end[0], first.mT) - chain.end_shift[0]
        slopes = mv(mm(mt(chain.to_end[0]), inverse(chain.end_noise[0])), gap)
        return torch.softmax(self.logs(time)[1].to(x) + density, -1), slopes.reshape(d, n, m)

    def behind(self, time: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares ``(n, k)`` of the earlier particles in what has been, and the slopes away from them ``(d, n, k)``."""
        part, now = self.part, self.inside(time)
        past = part.ts[part.ts < now - _EDGE * (part.end - part.start)]
        grid = torch.cat((past if len(past) else part.ts[:1], part.ts.new_tensor([now])))
        n, k, d = x.shape[0], self.x.shape[0], x.shape[1]
        first = self.x.expand(n, -1, -1).reshape(-1, d)
        second = x[:, None].expand(-1, k, -1).reshape(-1, d)
        chain = part.chain(first, second, grid)
        density = chain.log_density(first.mT, second.mT).reshape(n, k)
        # minus grad_x log N(x; Psi x_a + D, R) = R^{-1} (x - Psi x_a - D)
        gap = second.mT - mv(chain.to_end[0], first.mT) - chain.end_shift[0]
        slopes = mv(inverse(chain.end_noise[0]), gap)
        return torch.softmax(self.logs(time)[0].to(x) + density, -1), slopes.reshape(d, n, k)

    def rows(self, later: bool) -> int:
        """Return how many states fit into memory at once."""
        size = self.y.shape[0] if later else self.x.shape[0]
        return max(1, _CHUNK_NUMBERS // (len(self.part.ts) * size * self.x.shape[1] ** 2))


def forward_drift(side: Side, time: float, x: Tensor) -> Tensor:
    r"""Return :math:`b+GG^\top\nabla\log h_t` at ``x (n, d)``; at the end of the interval that just before it."""
    return _drift(side, time, x, True)


def backward_drift(side: Side, time: float, x: Tensor) -> Tensor:
    r"""Return :math:`b-GG^\top\nabla\log\varphi_t` at ``x (n, d)``: the velocity with which paths arrive."""
    return _drift(side, time, x, False)


def _drift(side: Side, time: float, x: Tensor, later: bool) -> Tensor:
    parts = []
    for own in x.split(side.rows(later)):
        share, slopes = side.ahead(time, own) if later else side.behind(time, own)
        parts.append(torch.einsum("dnm,nm->nd", slopes, share))
    t = torch.tensor(side.inside(time), dtype=x.dtype, device=x.device)
    return side.part.family(t, x) + torch.cat(parts) @ side.part.spread


def growth_rate(side: Side, time: float, x: Tensor) -> Tensor:
    r"""Return the mean of :math:`\dot\alpha_a+\dot\beta_b` over the pairs whose paths are at ``x (n, d)``."""
    if side.growth is None:
        return x.new_zeros(len(x))
    duration, parts = side.part.end - side.part.start, []
    rows, columns = (rate.to(x) / duration for rate in side.growth.rates(side.share(time)))
    for own in x.split(min(side.rows(True), side.rows(False))):
        parts.append(side.behind(time, own)[0] @ rows + side.ahead(time, own)[0] @ columns)
    return torch.cat(parts)


def owner(times: Tensor, time: float) -> tuple[int, int]:
    """Return the intervals that end and that begin at a time: one and the same between snapshots, and at the ends of the span."""
    slack = 1e-9 * float(times[-1] - times[0])
    last = len(times) - 2
    before = int((times < time - slack).sum()) - 1
    after = int((times <= time + slack).sum()) - 1
    return min(max(before, 0), last), min(max(after, 0), last)


def mean_velocity(
    snapshots: Snapshots,
    t: Tensor | float,
    x: Tensor,
    forward: Callable[[int, float, Tensor], Tensor],
    backward: Callable[[int, float, Tensor], Tensor],
) -> Tensor:
    r"""Return :math:`\tfrac12(b_++b_-)`, of which there is only one part at the first and at the last snapshot.

    Args:
        snapshots: The snapshots that the bridge passes through.
        t: The times, which broadcast to ``x[..., :1]``.
        x: The states, ``(*batch, d)``.
        forward: A function that returns the drift of an interval at one time and states ``(n, d)``; at a snapshot the interval
            after it counts.
        backward: A function that returns the drift of the process run backward, in the direction of time; at a snapshot the
            interval before it counts.
    """
    times = snapshots.times
    first, last = float(times[0]), float(times[-1])
    slack = 1e-9 * (last - first)

    def at(time: float, own: Tensor) -> Tensor:
        before, after = owner(times, time)
        parts = []
        if time < last - slack:
            parts.append(forward(after, time, own))
        if time > first + slack:
            parts.append(backward(before, time, own))
        return torch.stack(parts).mean(0)

    return at_times(snapshots, t, x, at)


def at_times(
    snapshots: Snapshots, t: Tensor | float, x: Tensor, evaluate: Callable[[float, Tensor], Tensor]
) -> Tensor:
    """Evaluate a function of one time and states ``(n, d)`` at times that broadcast to ``x[..., :1]``, states ``x (*batch, d)``."""
    x = as_tensor(x, "x", like=snapshots.samples[0], finite=False)
    check_event_size(x, snapshots.dim, "x")
    time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    check_inside(time.reshape(-1), snapshots.times, "t", "the snapshots")
    flat = x.reshape(-1, x.shape[-1])
    if time.numel() == 1:
        out = evaluate(float(time), flat)
        return out.reshape(*x.shape[:-1], *out.shape[1:])
    check_time_broadcast(time, x)
    each = time.expand(*x.shape[:-1], 1).reshape(-1)
    values, place = each.unique(return_inverse=True)
    parts = [evaluate(value, flat[place == j]) for j, value in enumerate(values.tolist())]
    out = flat.new_empty(len(flat), *parts[0].shape[1:])
    for j, part in enumerate(parts):
        out[place == j] = part
    return out.reshape(*x.shape[:-1], *out.shape[1:])
