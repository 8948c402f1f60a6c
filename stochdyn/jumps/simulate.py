"""Exact simulation of jump processes: direct in lanes, by thinning, and bridges between known states."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.jumps.filtering import Prepared, run_filter, transitions
from stochdyn.jumps.uniformisation import _transition, chain_powers, poisson_terms

__all__ = ["bridge_records", "direct_records", "thinned_records"]

#: A gap between two known states is cut into pieces of at most so many expected candidate jumps.
_PIECE = 20.0


def _uniform(n: int, source: torch.Generator | None) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=source)


def _pack(columns_t: list[Tensor], columns_s: list[Tensor], count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stack columns of jump times and states; what lies past a path's own jumps is padding."""
    lanes = len(count)
    times = torch.stack(columns_t, -1) if columns_t else torch.zeros(lanes, 0, dtype=torch.float64)
    return times, torch.stack(columns_s, -1), count


def direct_records(
    q: Tensor, first: Tensor, start: float, end: float, source: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw paths by the direct method, all lanes at once: an exponential stay, then a jump in proportion to the rates.

    Args:
        q: The generator ``(S, S)``, or several ``(B, S, S)``, of which lane l has number ``l % B``.
        first: The states of the lanes at the start, ``(L,)``.
        start: When the paths start.
        end: When they end.
        source: The source of randomness.

    Returns:
        Times ``(L, N)`` padded with infinity, states ``(L, N + 1)``, numbers of jumps ``(L,)``.
    """
    # rows of all generators one below the other: a lane reads those of its own
    size = q.shape[-1]
    shift = (torch.arange(len(first)) % (q.numel() // size**2)) * size
    exits = q.diagonal(dim1=-2, dim2=-1).reshape(-1).abs()  # not minus, whose zero has a sign
    jump = (q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))).reshape(-1, size)
    total = jump.sum(-1, keepdim=True)
    cumulative = torch.where(
        total > 0, jump / torch.where(total > 0, total, 1.0), torch.zeros_like(jump)
    ).cumsum(-1)
    # rounding must not leave the last possible jump short of one, nor reach an impossible one
    last = (jump > 0).to(torch.int8).flip(-1).argmax(-1)
    cumulative.scatter_(-1, (size - 1 - last)[:, None], 1.0)
    state = first.clone()
    now = torch.full((len(first),), start, dtype=torch.float64)
    count = torch.zeros(len(first), dtype=torch.long)
    columns_t, columns_s = [], [state.clone()]
    active = torch.arange(len(first))
    while len(active):
        here = state[active] + shift[active]
        stay = -torch.log1p(-_uniform(len(active), source)) / exits[here]
        later = now[active] + stay
        jumps = later <= end
        active = active[jumps]
        if not len(active):
            break
        here, later = here[jumps], later[jumps]
        new = torch.searchsorted(cumulative[here], _uniform(len(active), source)[:, None], right=True)[:, 0]
        now[active], state[active] = later, new
        count[active] += 1
        column = torch.full((len(first),), math.inf, dtype=torch.float64)
        column[active] = later
        columns_t.append(column)
        columns_s.append(state.clone())
    return _pack(columns_t, columns_s, count)


def thinned_records(
    rates: Callable[[Tensor], Tensor],
    bound: float,
    first: Tensor,
    start: float,
    end: float,
    source: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw paths of changing rates by thinning candidates of rate ``bound``.

    Raises:
        InvalidInputError: If an exit rate exceeds the bound, since the paths would then be wrong.
    """
    state = first.clone()
    now = torch.full((len(first),), start, dtype=torch.float64)
    count = torch.zeros(len(first), dtype=torch.long)
    columns_t: list[Tensor] = []
    columns_s = [state.clone()]
    active = torch.arange(len(first))
    while len(active):
        now[active] = now[active] - torch.log1p(-_uniform(len(active), source)) / bound
        active = active[now[active] <= end]
        if not len(active):
            break
        row = rates(now[active]).detach()[torch.arange(len(active)), state[active]].clone()
        row.scatter_(-1, state[active][:, None], 0.0)
        exits = row.sum(-1)
        if bool((exits > bound * (1 + 1e-9)).any()):
            raise InvalidInputError(
                "an exit rate exceeds the bound of thinning",
                got=float(exits.max()),
                expected=f"at most {bound:g}",
            )
        level = _uniform(len(active), source) * bound
        accepted = level < exits
        movers = active[accepted]
        if len(movers):
            cumulative = row[accepted].cumsum(-1)
            new = torch.searchsorted(cumulative, level[accepted][:, None], right=True)[:, 0]
            state[movers] = new
            place = count[movers]
            count[movers] += 1
            while len(columns_t) < int(count.max()):
                columns_t.append(torch.full((len(first),), math.inf, dtype=torch.float64))
                columns_s.append(torch.zeros_like(state))
            for k in place.unique().tolist():
                who = movers[place == k]
                columns_t[k][who] = now[who]
                columns_s[k + 1][who] = state[who]
    times, states, count = _pack(columns_t, columns_s, count)
    # pad states with the last one
    index = torch.arange(states.shape[1]).expand_as(states).minimum(count[:, None])
    return times, states.gather(1, index), count


def bridge_records(
    start_law: Tensor,
    q: Tensor,
    data: Prepared,
    start: float,
    end: float,
    lanes: int,
    source: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw paths given observations: states at a grid backwards, then a bridge over every gap.

    Reference:
        Hobolth and Stone, "Simulation from endpoint-conditioned, continuous-time Markov chains", 2009.
    """
    rate = float((-q.diagonal()).max()) or 1.0
    at = data.times[0]
    stop = max(end, float(at[-1]))
    # the grid: observations, the end, and cuts where a gap holds many candidates
    marks = torch.cat([at, torch.tensor([stop], dtype=torch.float64)])
    grid, log_b, entries = [], [], []
    before = start
    none = torch.zeros(q.shape[0], dtype=torch.float64)
    for k, mark in enumerate(marks.tolist()):
        pieces = max(1, math.ceil(rate * (mark - before) / _PIECE))
        for i in range(1, pieces):
            grid.append(before + (mark - before) * i / pieces)
            log_b.append(none)
            entries.append(-1)
        grid.append(mark)
        log_b.append(data.log_b[k, 0].detach() if k < len(at) else none)
        entries.append(int(data.entries[k, 0]) if k < len(at) else -1)
        before = mark
    times = torch.tensor(grid, dtype=torch.float64)
    laid = Prepared(times[None], torch.stack(log_b)[:, None], torch.tensor(entries)[:, None], torch.Size())
    known = run_filter(start_law, q, laid, start)
    steps = transitions(q, laid.times, start, laid.entries)[:, 0]
    # backwards: p(s_k | s_{k+1}) in proportion to alpha_k(s_k) P(s_k, s_{k+1})
    state = torch.multinomial(known.alpha[-1, 0], lanes, replacement=True, generator=source)
    path = [state]
    for k in range(len(times) - 1, -1, -1):
        filtered = known.alpha[k - 1, 0] if k else start_law
        weight = filtered * steps[k].mT[state]
        state = torch.multinomial(weight, 1, generator=source)[:, 0]
        path.append(state)
    nodes = torch.stack(path[::-1], -1)  # (L, grid + 1), the start first
    edges = torch.cat([torch.tensor([start], dtype=torch.float64), times])
    columns_t, columns_s = [], []
    for k in range(len(times)):
        span = float(edges[k + 1] - edges[k])
        goal = nodes[:, k + 1]
        if entries[k] >= 0:  # the last jump happens at the observation itself; before it the state is free
            weight = _transition(q, torch.tensor([span], dtype=torch.float64))[0][nodes[:, k]] * (
                q[:, entries[k]] * (torch.arange(len(q)) != entries[k])
            )
            goal = torch.multinomial(weight, 1, generator=source)[:, 0]
        t, s = _bridges(q, rate, nodes[:, k], goal, span, source)
        columns_t.append(t + edges[k])
        columns_s.append(s)
        if entries[k] >= 0:
            columns_t.append(torch.full((lanes, 1), float(edges[k + 1]), dtype=torch.float64))
            columns_s.append(nodes[:, k + 1 : k + 2])
    times_all, states_all = torch.cat(columns_t, -1), torch.cat(columns_s, -1)
    return _real_jumps(times_all, states_all, nodes[:, 0], end)


def _bridges(
    q: Tensor, rate: float, a: Tensor, b: Tensor, span: float, source: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return candidate times within the gap ``(L, N)``, padded with infinity, and states after each."""
    lanes, mean = len(a), rate * span
    terms = poisson_terms(mean)
    step = torch.eye(len(q), dtype=q.dtype) + q / rate
    stack = chain_powers(step, terms + 1)
    k = torch.arange(terms + 1, dtype=torch.float64)
    log_poisson = (
        k * math.log(mean) - mean - torch.lgamma(k + 1) if mean > 0 else torch.where(k == 0, 0.0, -math.inf)
    )
    weight = log_poisson.exp() * stack[:, a, b].mT
    count = torch.multinomial(weight, 1, generator=source)[:, 0]
    most = int(count.max()) if lanes else 0
    if most == 0:
        return torch.zeros(lanes, 0, dtype=torch.float64), torch.zeros(lanes, 0, dtype=torch.long)
    times = torch.rand(lanes, most, dtype=torch.float64, generator=source) * span
    real = torch.arange(most) < count[:, None]
    times = torch.where(real, times, torch.full_like(times, math.inf)).sort(-1).values
    state, states = a, []
    for n in range(most):
        left = (count - n - 1).clamp(min=0)
        weight = step[state] * stack[left, :, b]
        new = torch.multinomial(
            torch.where(real[:, n : n + 1], weight, torch.ones_like(weight)), 1, generator=source
        )[:, 0]
        state = torch.where(real[:, n], new, state)
        states.append(state)
    return times, torch.stack(states, -1)


def _real_jumps(times: Tensor, states: Tensor, first: Tensor, end: float) -> tuple[Tensor, Tensor, Tensor]:
    """Drop candidates that don't change the state, and jumps past the end; pack the rest to the left."""
    lanes = len(first)
    if times.shape[1] == 0:
        return times, first[:, None], torch.zeros(lanes, dtype=torch.long)
    # padding lies within: carry the last state over it
    real = torch.isfinite(times)
    order = torch.where(real, torch.arange(times.shape[1]), torch.full((), -1)).cummax(-1).values
    carried = torch.where(order >= 0, states.gather(1, order.clamp(min=0)), first[:, None])
    before = torch.cat([first[:, None], carried[:, :-1]], 1)
    keep = real & (carried != before) & (times <= end)
    count = keep.sum(-1)
    most = int(count.max())
    place = torch.where(keep, keep.cumsum(-1) - 1, torch.full((), most))
    out_t = torch.full((lanes, most + 1), math.inf, dtype=torch.float64).scatter(
        1, place, torch.where(keep, times, math.inf)
    )
    out_s = torch.zeros(lanes, most + 1, dtype=torch.long).scatter(1, place, carried)
    whole = torch.cat([first[:, None], out_s[:, :most]], 1)
    index = torch.arange(most + 1).expand_as(whole).minimum(count[:, None])
    return out_t[:, :most], whole.gather(1, index), count
