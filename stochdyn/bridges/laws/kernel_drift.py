"""The drift of a bridge by the kernel formula, from the potentials of its couplings."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import check_event_size, check_inside, check_time_broadcast
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws._small import inverse, mm, mt, mv
from stochdyn.bridges.laws.linearised import Transition
from stochdyn.core.transport.entropic import TransportPlan

__all__ = ["bridge_drift"]

_CHUNK_NUMBERS = 2**22


def bridge_drift(
    snapshots: Snapshots,
    plans: list[TransportPlan],
    parts: list[Transition],
    t: Tensor | float,
    x: Tensor,
) -> Tensor:
    """Return the drift ``(*batch, d)`` at times ``t`` that broadcast to ``x[..., :1]``, and states ``x (*batch, d)``."""
    check_event_size(x, snapshots.dim, "x")
    time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    check_inside(time.reshape(-1), snapshots.times, "t", "the snapshots")
    if time.ndim == 0:
        return _at(snapshots, plans, parts, float(time), x.reshape(-1, x.shape[-1])).reshape(x.shape)
    check_time_broadcast(time, x)
    each = time.expand(*x.shape[:-1], 1).squeeze(-1)
    out = torch.empty_like(x)
    for value in each.unique().tolist():
        here = each == value
        out[here] = _at(snapshots, plans, parts, value, x[here])
    return out


def _at(
    snapshots: Snapshots, plans: list[TransportPlan], parts: list[Transition], time: float, x: Tensor
) -> Tensor:
    times = snapshots.times
    i = min(max(int(torch.searchsorted(times, time, right=True)) - 1, 0), len(parts) - 1)
    part, y = parts[i], snapshots.samples[i + 1]
    # at the last snapshot itself the drift is infinite: the value just before is given
    least = 1e-6 * (part.end - part.start)
    grid = part.ts[part.ts > time + least]
    now = min(time, part.end - least)
    grid = torch.cat((torch.tensor([now], dtype=torch.float64), grid if len(grid) else part.ts[-1:]))
    log_h = snapshots.weights[i + 1].log() + plans[i].scaled_potentials[1].to(x)
    rows = max(1, _CHUNK_NUMBERS // (len(grid) * y.shape[0] * x.shape[1] ** 2))
    pulls = [_pull(part, own, y, log_h, grid) for own in x.split(rows)]
    t = torch.tensor(now, dtype=x.dtype, device=x.device)
    return part.family(t, x) + torch.cat(pulls) @ part.spread


def _pull(part: Transition, x: Tensor, y: Tensor, log_h: Tensor, grid: Tensor) -> Tensor:
    """Return the gradient ``(n, d)`` of ``log sum_b h_b p(y_b | x)``."""
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    first = x[:, None].expand(-1, m, -1).reshape(-1, d)
    second = y.expand(n, -1, -1).reshape(-1, d)
    chain = part.chain(first, second, grid)
    density = chain.log_density(first.mT, second.mT).reshape(n, m)
    gap = second.mT - mv(chain.to_end[0], first.mT) - chain.end_shift[0]
    slopes = mv(mm(mt(chain.to_end[0]), inverse(chain.end_noise[0])), gap)  # (d, n m)
    weight = torch.softmax(log_h + density, -1)
    return torch.einsum("dnm,nm->nd", slopes.reshape(d, n, m), weight)
