"""The residual of a forward equation as an objective, and where to evaluate it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_positive_int, check_same_device
from stochdyn.core.forward.divergences import unbiased_square
from stochdyn.core.forward.flow import MarginalFlow
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["FlowPoints", "ForwardResidual", "UniformPoints"]

Points = tuple[Tensor, Tensor]
PointSampler = Callable[[], Points]
Weight = Callable[[Tensor, Tensor], Tensor]


class UniformPoints:
    """Points uniform in a box and in time, drawn from torch's global generator.

    Args:
        low: ``(d,)`` lower corner; its precision and device are those of the points.
        high: ``(d,)`` upper corner.
        start: first time.
        end: last time.
        num_points: how many points a call.

    Raises:
        ShapeError: if the corners differ in shape.
        InvalidInputError: if ``num_points`` isn't positive or ``end`` isn't after ``start``.

    Example:
        >>> t, x = UniformPoints(-torch.ones(2), torch.ones(2), 0.0, 1.0, 5)()
        >>> t.shape, x.shape
        (torch.Size([5, 1]), torch.Size([5, 2]))
    """

    def __init__(self, low: Tensor, high: Tensor, start: float, end: float, num_points: int) -> None:
        if low.ndim != 1 or low.shape != high.shape:
            raise ShapeError(
                "the corners of a box are (d,) each", got=f"{tuple(low.shape)} and {tuple(high.shape)}"
            )
        check_same_device(low=low, high=high)
        _check_span(start, end, num_points)
        self.low, self.high, self.start, self.end, self.num_points = low, high, start, end, num_points

    def __call__(self) -> Points:
        """Return times ``(n, 1)`` and points ``(n, d)``."""
        n, low = self.num_points, self.low
        u = torch.rand(n, low.shape[0] + 1, dtype=low.dtype, device=low.device)
        return self.start + (self.end - self.start) * u[:, :1], low + (self.high - low) * u[:, 1:]


class FlowPoints:
    """Points drawn from a flow at uniform times, without gradients: where the probability is.

    Args:
        flow: what to sample, the learned flow itself or a reference.
        start: first time.
        end: last time.
        num_points: how many points a call.
        like: a tensor whose precision and device the times take; torch's default if None.

    Raises:
        InvalidInputError: if ``num_points`` isn't positive or ``end`` isn't after ``start``.
    """

    def __init__(
        self, flow: MarginalFlow, start: float, end: float, num_points: int, like: Tensor | None = None
    ) -> None:
        _check_span(start, end, num_points)
        self.flow, self.start, self.end, self.num_points = flow, start, end, num_points
        self.like = torch.empty(0) if like is None else like

    def __call__(self) -> Points:
        """Return times ``(n, 1)`` and points ``(n, d)``."""
        u = torch.rand(self.num_points, dtype=self.like.dtype, device=self.like.device)
        t = self.start + (self.end - self.start) * u
        with torch.no_grad():
            return t[:, None], self.flow.sample(t, 1)[:, 0]


def _check_span(start: float, end: float, num_points: int) -> None:
    check_positive_int(num_points, "num_points")
    if not end > start:
        raise InvalidInputError("end must come after start", got=f"start={start}, end={end}")


class ForwardResidual(Objective):
    r"""Mean square residual of a forward equation over points in time and space.

    .. math:: \ell = \mathbb E_{t,x}\left[w(t,x)\,|R(t,x)|^2\right]

    With ``method="hutchinson"`` the square is estimated without bias, by products of residuals of independent
    probes; single losses may then be negative.

    Args:
        flow: the densities to be learned.
        operator: the equation. Parameters inside it are trained as well; freeze those that shouldn't move.
        sampler: gives ``(t, x)`` when the objective is called without a batch, such as :class:`UniformPoints`
            and :class:`FlowPoints`.
        weight: ``weight(t, x) -> (...)``, or None for 1. Near a singular start weigh by the squared variance.
        form: ``"log"``, ``"score"`` or ``"density"``; see :meth:`stochdyn.FokkerPlanck.residual`. A master
            equation knows the log form only.
        method: ``"exact"`` or ``"hutchinson"``.
        num_probes: probes a point, at least 2 with ``"hutchinson"``.
        stationary: leave out the time derivative.

    Raises:
        InvalidInputError: if an option is unknown, or ``"hutchinson"`` has fewer than two probes.

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
        method: Literal["exact", "hutchinson"] = "exact",
        num_probes: int = 2,
        stationary: bool = False,
    ) -> None:
        super().__init__()
        check_choice(form, ("log", "score", "density"), "form")
        check_choice(method, ("exact", "hutchinson"), "method")
        if method == "hutchinson":
            check_positive_int(num_probes, "num_probes", 2)
        self.flow, self.operator, self.sampler, self.weight = flow, operator, sampler, weight
        self.form, self.method = form, method
        self.options: dict[str, Any] = {"stationary": stationary} if stationary else {}
        if form != "log":
            self.options["form"] = form
        if method == "hutchinson":
            self.options |= {"method": method, "num_probes": num_probes}

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
            InvalidInputError: if there are neither points nor a sampler.
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
