"""Few points carried along a flow: derivatives of the whole way from the velocity's, all of which are taken at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_finite, values_unchecked
from stochdyn._transforms import recording, transforms_are_active
from stochdyn.interpolants.fields.networks import Fields, evaluating
from stochdyn.interpolants.sampling.methods import Adaptive, FlowMethod
from stochdyn.interpolants.sampling.samplers import integrate_ode

__all__ = ["carry", "stages_of"]

Velocity = Callable[[Tensor, Tensor, Any], Tensor]

# Above this many numbers the network itself costs more than the bookkeeping that is saved here.
_FEW = 64


def carry(
    fields: Fields,
    velocity: Velocity,
    x: Tensor,
    condition: Tensor | None,
    ts: Tensor,
    method: FlowMethod,
    inside: tuple[bool, bool] = (False, False),
    stages: Tensor | None = None,
) -> Tensor:
    r"""Carry points along :math:`\dot x=b(t,x)`, differentiably.

    It is what :func:`integrate_ode` returns, with the derivatives of its steps. Where points are few, as in the chain of a sampler, most of
    the time of a reverse pass through the steps goes into the bookkeeping of a graph of small operations. So the way is walked without a
    graph here, and in the reverse pass the Jacobians of the velocity at all of its points :math:`X_i` come from one evaluation and d reverse
    passes. Since every scheme is linear in its slopes, its tangents are those of the same scheme for the linear field
    :math:`J_i=\partial_xb(t_i,X_i)`.

    Args:
        fields: The fields that the velocity is made of; they are evaluated in evaluation mode.
        velocity: The velocity as a function ``b(t, x, condition) -> (n, d)`` of one time ``()`` or of one for each point ``(n, 1)``,
            and of every point by itself.
        x: The points at ``ts[0]``, ``(n, d)``.
        condition: One condition for each point ``(n, ...)``, or None.
        ts: The times, strictly increasing or strictly decreasing, ``(T,)``.
        method: How to take a step.
        inside: Whether the velocity is known at the first and at the last time as a limit only, as in :func:`integrate_ode`.
        stages: The times that :func:`stages_of` returns for this grid, where they are known already.

    Returns:
        ``(n, d)``, with first and second derivatives in the points, the condition and the parameters.
    """
    few = x.numel() <= _FEW and x.ndim == 2
    plain = (
        not fields.owns_all or not torch.is_grad_enabled() or not x.requires_grad or transforms_are_active()
    )
    way = _Way(fields, velocity, x, condition, ts, method, inside, stages)
    if plain or not few or isinstance(method, Adaptive):
        return way.walk(x, condition)
    end: Tensor = _InStarts.apply(way, x)
    others = way.others
    # a node of its own: a sampler asks for derivatives in the points alone, and then it isn't visited
    return end + _InOthers.apply(way, *others) if others else end


def stages_of(ts: Tensor, method: FlowMethod, inside: tuple[bool, bool]) -> Tensor:
    """Return the times at which a method with fixed steps looks at the velocity, in order, ``(S,)``."""
    times: list[Tensor] = []

    def noted(t: Tensor, y: Tensor) -> Tensor:
        times.append(t)
        return y

    integrate_ode(noted, torch.zeros_like(ts[:1]), ts, method, inside=inside)
    return torch.stack(times)


class _Way:
    """A flow on a grid, and what is to be remembered of the way of some points."""

    def __init__(
        self, fields: Fields, velocity: Velocity, x: Tensor, condition: Tensor | None, ts: Tensor, method: FlowMethod,
        inside: tuple[bool, bool], stages: Tensor | None,
    ) -> None:  # fmt: skip
        self.fields, self.velocity, self.x, self.condition = fields, velocity, x, condition
        self.ts, self.method, self.inside = ts, method, inside
        self.parameters = tuple(p for p in fields.parameters() if p.requires_grad)
        self.stages = stages
        self.times: list[Tensor] = []
        self.points: list[Tensor] = []
        self._jacobians: Tensor | None = None

    @property
    def others(self) -> tuple[Tensor, ...]:
        """What derivatives may be asked in besides the points."""
        if self.condition is None or not self.condition.requires_grad:
            return self.parameters
        return (self.condition, *self.parameters)

    def integrate(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        return integrate_ode(field, x, self.ts, self.method, inside=self.inside)

    def walk(self, x: Tensor, condition: Tensor | None) -> Tensor:
        with evaluating(self.fields):
            return self.integrate(lambda t, y: self.velocity(t, y, condition), x)

    def remember(self) -> Tensor:
        """Walk without a graph."""

        def noted(t: Tensor, y: Tensor) -> Tensor:
            self.times.append(t)
            self.points.append(y)
            return self.velocity(t, y, condition)

        condition = None if self.condition is None else self.condition.detach()
        with evaluating(self.fields), values_unchecked(), self.fields.at_times(self.known_stages):
            end = self.integrate(noted, self.x.detach())
        check_finite(end, "x")
        return end

    def known_stages(self) -> Tensor:
        if self.stages is None:
            self.stages = stages_of(self.ts, self.method, self.inside)
        return self.stages

    def slopes(self, condition: Tensor | None, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Return copies of all points of the way and the velocity there, ``(copies S n, d)``, with a graph between them."""
        n, d = self.x.shape
        count = copies * len(self.times)
        points = torch.stack(self.points * copies).reshape(-1, d).requires_grad_()
        times = torch.stack(self.times * copies).to(points).repeat_interleave(n).unsqueeze(-1)
        rows = None if condition is None else condition.repeat(count, *[1] * (condition.ndim - 1))
        with evaluating(self.fields):
            return points, self.velocity(times, points, rows)

    @property
    def jacobians(self) -> Tensor:
        """The Jacobians of the velocity along the way, ``(S, n, d, d)``."""
        if self._jacobians is None:
            n, d = self.x.shape
            count = len(self.times)
            with recording():
                # copy i of the points is for row i: one large reverse pass in place of d small ones
                points, values = self.slopes(None if self.condition is None else self.condition.detach(), d)
                if values.requires_grad:
                    chosen = values.reshape(d, -1, d).diagonal(dim1=0, dim2=2)
                    rows = torch.autograd.grad(
                        chosen.sum(), points, materialize_grads=True, allow_unused=True
                    )[0]
                else:
                    rows = torch.zeros_like(values)
            self._jacobians = rows.reshape(d, count, n, d).permute(1, 2, 0, 3).contiguous()
        return self._jacobians

    def tangents(self, first: Tensor, pushed: Tensor | None = None) -> Tensor:
        """Carry tangents ``(n, d, k)`` to the end; ``pushed (S, n, d, k)`` is added to the slopes."""
        counted = iter(self.jacobians.unbind(0))
        added = None if pushed is None else iter(pushed.unbind(0))

        def linear(t: Tensor, y: Tensor) -> Tensor:
            slope = next(counted) @ y
            return slope if added is None else slope + next(added)

        return self.integrate(linear, first)

    def differentiate(self, inputs: tuple[Tensor, ...], slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return derivatives that have derivatives themselves, by the graph of the whole way."""
        with recording():
            end = self.walk(self.x, self.condition)
            return torch.autograd.grad(end, inputs, slope, create_graph=True, allow_unused=True)


class _InStarts(torch.autograd.Function):
    """The end of a way as a function of its start."""

    @staticmethod
    def forward(ctx: Any, way: _Way, x: Tensor) -> Tensor:
        ctx.way = way
        return way.remember()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        way: _Way = ctx.way
        if torch.is_grad_enabled():
            return None, way.differentiate((way.x,), slope)[0]
        n, d = way.x.shape
        ends = way.tangents(torch.eye(d).to(slope).expand(n, d, d))
        return None, (ends.mT @ slope.unsqueeze(-1)).squeeze(-1)


class _InOthers(torch.autograd.Function):
    """Zero, with the derivatives of the end of a way in everything but its start."""

    @staticmethod
    def forward(ctx: Any, way: _Way, *others: Tensor) -> Tensor:
        ctx.way = way
        return torch.zeros_like(way.x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        way: _Way = ctx.way
        if torch.is_grad_enabled():
            return None, *way.differentiate(way.others, slope)
        with recording():
            # how much the end moves with each of the slopes on the way
            pushed = way.jacobians.new_zeros(way.jacobians.shape[:-1]).unsqueeze(-1).requires_grad_()
            end = way.tangents(torch.zeros_like(slope).unsqueeze(-1), pushed)
            weights = torch.autograd.grad(end, pushed, slope.unsqueeze(-1))[0]
            condition = way.condition
            leaf = condition is not None and condition.requires_grad
            seen = condition.detach().requires_grad_() if leaf else condition  # type: ignore[union-attr]
            values = way.slopes(seen)[1]
            inputs = (*((seen,) if leaf else ()), *way.parameters)
            grads = torch.autograd.grad(values, inputs, weights.reshape(values.shape), allow_unused=True)
        return None, *grads
