"""The residual of a forward equation as an objective, and where to evaluate it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_bool,
    check_choice,
    check_positive_int,
    check_real,
    check_same_device,
    check_type,
)
from stochdyn.core.forward.divergences import Hutchinson, as_trace_method, unbiased_square
from stochdyn.core.forward.flow import MarginalFlow
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["FlowPoints", "ForwardResidual", "UniformPoints"]

Points = tuple[Tensor, Tensor]
PointSampler = Callable[[], Points]
Weight = Callable[[Tensor, Tensor], Tensor]


class UniformPoints(nn.Module):
    """Points uniform in a box and in time, drawn from torch's global generator.

    When to use it: for equations that must hold where there is little probability too; else :class:`FlowPoints`.

    Args:
        low: The lower corner ``(d,)`` of the box; its precision and device are those of the points.
        high: The upper corner ``(d,)`` of the box.
        start_time: The first time.
        horizon: The last time.
        num_points: The number of points drawn per call.

    Raises:
        ShapeError: If the corners differ in shape.
        InvalidInputError: If ``num_points`` isn't positive, or ``horizon`` isn't after ``start_time``.

    Example:
        >>> t, x = UniformPoints(-torch.ones(2), torch.ones(2), 0.0, 1.0, 5)()
        >>> t.shape, x.shape
        (torch.Size([5, 1]), torch.Size([5, 2]))
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: object, high: object, start_time: float, horizon: float, num_points: int) -> None:
        super().__init__()
        lower = as_tensor(low, "low", 1, "(d,)")
        upper = as_tensor(high, "high", 1, "(d,)", like=lower)
        if lower.shape != upper.shape:
            raise ShapeError(
                "the corners of a box are (d,) each", got=f"{tuple(lower.shape)} and {tuple(upper.shape)}"
            )
        check_same_device(low=lower, high=upper)
        _check_span(start_time, horizon, num_points)
        self.register_buffer("low", lower)
        self.register_buffer("high", upper)
        self.start_time, self.horizon, self.num_points = start_time, horizon, num_points

    def forward(self) -> Points:
        """Return times ``(n, 1)`` and points ``(n, d)``."""
        n, low = self.num_points, self.low
        u = torch.rand(n, low.shape[0] + 1, dtype=low.dtype, device=low.device)
        t = self.start_time + (self.horizon - self.start_time) * u[:, :1]
        return t, low + (self.high - low) * u[:, 1:]


class FlowPoints(nn.Module):
    """Points drawn from a flow at uniform times, without gradients: where the probability is.

    Use it where the equation must hold where the probability is; :class:`UniformPoints` also looks where there is
    little.

    Args:
        flow: What to sample, the learned flow itself or a reference.
        start_time: The first time.
        horizon: The last time.
        num_points: The number of points drawn per call.
        like: A tensor whose precision and device the times take; torch's default if None.

    Raises:
        InvalidInputError: If ``num_points`` isn't positive, or ``horizon`` isn't after ``start_time``.
    """

    like: Tensor

    def __init__(
        self,
        flow: MarginalFlow,
        start_time: float,
        horizon: float,
        num_points: int,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_type(flow, MarginalFlow, "flow")
        _check_span(start_time, horizon, num_points)
        self.flow = flow
        self.start_time, self.horizon, self.num_points = start_time, horizon, num_points
        self.register_buffer("like", torch.empty(0) if like is None else like.detach().new_empty(0))

    def forward(self) -> Points:
        """Return times ``(n, 1)`` and points ``(n, d)``."""
        u = torch.rand(self.num_points, dtype=self.like.dtype, device=self.like.device)
        t = self.start_time + (self.horizon - self.start_time) * u
        with torch.no_grad():
            return t[:, None], self.flow.sample(t, 1)[:, 0]


def _check_span(start_time: float, horizon: float, num_points: int) -> None:
    check_positive_int(num_points, "num_points")
    check_real(start_time, "start_time")
    check_real(horizon, "horizon", above=float(start_time))


class ForwardResidual(Objective):
    r"""Mean square residual of a forward equation over points in time and space.

    .. math:: \ell = \mathbb E_{t,x}\left[w(t,x)\,|R(t,x)|^2\right]

    With ``method="hutchinson"`` the square is estimated without bias, by products of residuals of independent
    probes; single losses may then be negative.

    Use it to learn densities from an equation alone, or to hold a learnt flow to its equation.

    Args:
        flow: The densities to be learned.
        operator: The equation. Parameters inside it are trained as well; freeze those that shouldn't move.
        sampler: What gives ``(t, x)`` when the objective is called without a batch, such as :class:`UniformPoints` and
            :class:`FlowPoints`.
        weight: A function ``weight(t, x) -> (...)``, or None for 1. Near a singular start weigh by the squared
            variance.
        form: The form of the residual: ``"log"``, ``"score"`` or ``"density"``; see
            :meth:`stochdyn.FokkerPlanck.residual`. A master equation knows the log form only.
        method: The method: ``"exact"``, or ``"hutchinson"`` where derivatives by every component cost too much;
            :class:`~stochdyn.core.forward.divergences.Hutchinson` has its options, and needs two probes here.
        stationary: Whether to leave out the time derivative.

    Raises:
        InvalidInputError: If an option is unknown, or a square of fewer than two probes is asked for.

    Example:
        >>> from stochdyn.core import GaussianFlow
        >>> from stochdyn.core import FokkerPlanck
        >>> from stochdyn.core import SDE
        >>> flow = GaussianFlow(lambda t: torch.zeros(*t.shape, 1), lambda t: 0.5 * torch.eye(1))
        >>> objective = ForwardResidual(flow, FokkerPlanck(SDE(lambda t, x: -x, 1.0)), stationary=True)
        >>> bool(objective((torch.tensor(0.0), torch.randn(8, 1))).loss < 1e-10)
        True
    """

    def __init__(
        self,
        flow: MarginalFlow,
        operator: ForwardOperator,
        sampler: PointSampler | None = None,
        weight: Weight | None = None,
        *,
        form: Literal["log", "score", "density"] = "log",
        method: Literal["exact", "hutchinson"] | Hutchinson = "exact",
        stationary: bool = False,
    ) -> None:
        super().__init__()
        check_type(flow, MarginalFlow, "flow")
        check_type(operator, ForwardOperator, "operator")
        check_bool(stationary, "stationary")
        check_choice(form, ("log", "score", "density"), "form")
        chosen = as_trace_method(method, ("exact", "hutchinson"))
        if isinstance(chosen, Hutchinson):
            check_positive_int(chosen.num_probes, "num_probes", 2)
        self.flow, self.operator, self.sampler, self.weight = flow, operator, sampler, weight
        self.form, self.method = form, chosen
        self.options: dict[str, Any] = {"stationary": stationary} if stationary else {}
        if form != "log":
            self.options["form"] = form
        if isinstance(chosen, Hutchinson):
            self.options["method"] = chosen

    def squares(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the squared residual at every point ``(...)``, exact or unbiased."""
        if self.method == "exact":
            square = self.operator.residual(self.flow, t, x, **self.options).square()
        else:
            square = unbiased_square(self.operator.residual_probes(self.flow, t, x, **self.options))
        return square.sum(-1) if self.form == "score" else square

    def forward(self, batch: Points | None = None) -> ObjectiveValue:
        """Evaluate at the points of ``batch = (t, x)``, or at fresh ones of the sampler.

        Raises:
            InvalidInputError: If there are neither points nor a sampler.
        """
        if batch is None:
            if self.sampler is None:
                raise InvalidInputError("there are no points", hint="pass (t, x), or give a sampler")
            batch = self.sampler()
        t, x = batch
        squares = self.squares(t, x)
        weighted = squares if self.weight is None else squares * self.weight(t, x)
        loss = weighted.mean()
        terms = {"residual": loss.detach(), "mean_square": squares.detach().mean()}
        return ObjectiveValue(loss, terms, "residual")
