"""Forward operators that transport mass along a velocity, and how far a flow is from solving their equation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from stochdyn._checks import as_generator, check_choice, check_type
from stochdyn._transforms import ordinarily, recording
from stochdyn.core.forward.divergences import (
    Hutchinson,
    as_trace_method,
    attach,
    divergence_probes,
    exact_divergence,
    gradient,
    pull_back,
    release,
    sample_probes,
)
from stochdyn.core.forward.flow import MarginalFlow, as_time, time_derivative
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.errors import InvalidInputError

__all__ = ["ContinuityEquation", "TransportOperator"]

Field = Callable[[Tensor, Tensor], Tensor]
Form = Literal["log", "score", "density"]
Probing = Literal["exact", "hutchinson"] | Hutchinson
_PROBING = ("exact", "hutchinson")


class TransportOperator(ForwardOperator, ABC):
    r"""A forward operator that transports mass along a velocity, which may itself depend on the score.

    .. math::
        L^*\rho = -\nabla\cdot(v\rho),\qquad
        \frac{L^*\rho}{\rho} = -\nabla\cdot v - v\cdot\nabla\log\rho

    All three forms below follow from the velocity, so subclasses give that alone.
    """

    @property
    def random_velocity(self) -> bool:
        """Whether :meth:`velocity` makes use of a probe."""
        return False

    @abstractmethod
    def velocity(self, t: Tensor, x: Tensor, score: Tensor, probe: Tensor | None = None) -> Tensor:
        """Return the velocity ``(..., d)`` of a density with the given score ``(..., d)``.

        Args:
            t: The times that broadcast to ``x[..., :1]``.
            x: The points ``(..., d)`` with ``requires_grad``.
            score: The gradient ``(..., d)`` of the log density.
            probe: The vectors ``(..., d)`` of unit covariance: where given, an unbiased estimate will do, made with
                these and linear in nothing else that is random.
        """

    @abstractmethod
    def flux(self, t: Tensor, x: Tensor, density: Tensor) -> Tensor:
        """Return the probability current ``(..., d)`` of a density ``(...)`` computed from ``x``."""

    @ordinarily
    def log_rate(
        self,
        score: Field,
        t: Tensor | float,
        x: Tensor,
        *,
        method: Probing = "exact",
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        r"""Rate of change that the equation asks of a log density, from its score.

        .. math:: \frac{L^*\rho}{\rho}(x) = -\nabla\cdot v - v\cdot s

        Args:
            score: A function ``score(t, x) -> (..., d)``.
            t: The time or times, broadcast to ``x[..., :1]``.
            x: The points ``(..., d)``.
            method: The method: ``"exact"`` (``d`` reverse passes), or ``"hutchinson"`` (one per probe, unbiased), whose
                options :class:`~stochdyn.core.forward.divergences.Hutchinson` has.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(...)``.
        """
        time = as_time(t, x)
        create_graph = torch.is_grad_enabled()
        with recording():
            y = attach(x)
            rates = self._rates(score(time, y), time, y, method, generator, create_graph)
        return release(rates.mean(0), create_graph, (x, y))

    def _rates(
        self,
        score: Tensor,
        t: Tensor,
        y: Tensor,
        method: Probing,
        generator: torch.Generator | int | None,
        create_graph: bool = True,
    ) -> Tensor:
        """Return ``(K, ...)`` independent unbiased values of the log rate (``K = 1`` when exact)."""
        chosen = as_trace_method(method, _PROBING)
        if not isinstance(chosen, Hutchinson):
            # (L* rho) / rho = -div v - v . s.
            v = self.velocity(t, y, score).expand_as(y)
            return (-exact_divergence(v, y, create_graph) - (v * score).sum(-1))[None]
        generator = as_generator(generator, y.device)
        if not self.random_velocity:
            v = self.velocity(t, y, score).expand_as(y)
            return -divergence_probes(v, y, chosen.sample(y, generator), create_graph) - (v * score).sum(-1)
        rates = []
        # A velocity that is estimated itself needs probes of its own, independent of those of the divergence.
        for outer in chosen.sample(y, generator):
            inner = sample_probes(y, 1, chosen.distribution, generator)[0]
            v = self.velocity(t, y, score, inner).expand_as(y)
            rates.append(-divergence_probes(v, y, outer[None], create_graph)[0] - (v * score).sum(-1))
        return torch.stack(rates)

    @ordinarily
    def score_rate(self, score: Field, t: Tensor | float, x: Tensor, **options: Any) -> Tensor:
        r"""Rate of change that the equation asks of a score, ``(..., d)``; options as :meth:`log_rate`.

        .. math:: \nabla\left[-\nabla\cdot v - v\cdot s\right]
        """
        time = as_time(t, x)
        return gradient(lambda y: self.log_rate(score, time, y, **options), x)

    @ordinarily
    def density_rate(self, density: Field, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Rate of change that the equation asks of a density, signed or not, ``(...)``.

        .. math:: L^*\rho(x) = -\nabla\cdot J,

        with the probability current :math:`J=v\rho` written without a division by :math:`\rho`.

        Args:
            density: A function ``density(t, x) -> (...)``.
            t: The time or times, broadcast to ``x[..., :1]``.
            x: The points ``(..., d)``.

        Returns:
            ``(...)``.
        """
        time = as_time(t, x)
        create_graph = torch.is_grad_enabled()
        with recording():
            y = attach(x)
            current = self.flux(time, y, density(time, y)).expand_as(y)
            result = -exact_divergence(current, y, create_graph)
        return release(result, create_graph, (x, y))

    @ordinarily
    def residual(  # type: ignore[override]  # named options in place of any
        self,
        flow: MarginalFlow,
        t: Tensor | float,
        x: Tensor,
        *,
        form: Form = "log",
        method: Probing = "exact",
        stationary: bool = False,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        r"""How far a flow is from solving the forward equation, at every point.

        .. math::
            R &= \partial_t\log\rho + \nabla\cdot v + v\cdot s &&\text{(log)}\\
            R &= \partial_t s + \nabla(\nabla\cdot v + v\cdot s) &&\text{(score)}\\
            R &= \partial_t\rho - L^*\rho &&\text{(density)}

        Args:
            flow: The densities. The score form asks it for its score only, so it serves score networks.
            t: The time or times, broadcast to ``x[..., :1]``.
            x: The points ``(..., d)``.
            form: The form of the residual: ``"log"``, ``"score"`` or ``"density"``.
            method: The method: ``"exact"``, or ``"hutchinson"`` (log and score form): unbiased, but its square isn't,
                see :meth:`residual_probes`.
            stationary: Whether to leave out the time derivative.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(...)``, and ``(..., d)`` in score form; zero for a solution.

        Raises:
            ShapeError: If ``t`` doesn't broadcast to ``x[..., :1]``.
            InvalidInputError: If an option is unknown, or ``"hutchinson"`` is asked of the density form.
            UnavailableError: If the log or density form is asked of a flow without a density.

        Reference:
            Lai et al., "FP-Diffusion", ICML 2023 (score form).
        """
        return self.residual_probes(
            flow, t, x, form=form, method=method, stationary=stationary, generator=generator
        ).mean(0)

    @ordinarily
    def residual_probes(  # type: ignore[override]  # named options in place of any
        self,
        flow: MarginalFlow,
        t: Tensor | float,
        x: Tensor,
        *,
        form: Form = "log",
        method: Probing = "hutchinson",
        stationary: bool = False,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        """Return ``(num_probes, ...)`` independent unbiased residuals, for :func:`unbiased_square`.

        Arguments as :meth:`residual`; with ``method="exact"`` the leading axis is 1.
        """
        check_type(flow, MarginalFlow, "flow")
        check_choice(form, ("log", "score", "density"), "form")
        if form == "density" and as_trace_method(method, _PROBING) != "exact":
            raise InvalidInputError("the density form is exact only", hint="use form='log' with probes")
        time = as_time(t, x)
        create_graph = torch.is_grad_enabled()
        with recording():
            y, s = attach(x), time if stationary else attach(time)
            if form == "density":
                result = self._density_residual(flow, s, y, stationary)[None]
            else:
                # R = d/dt log rho - (L* rho) / rho; in score form the gradient of both terms.
                inside = create_graph or form == "score"
                rates = self._rates(flow.score(time, y), time, y, method, generator, inside)
                if form == "score":
                    rates = torch.stack([pull_back(r, y, create_graph=create_graph) for r in rates])
                result = -rates
                if not stationary:
                    change = flow.time_derivative if form == "log" else flow.score_time_derivative
                    result = result + change(s, y)
        return release(result, create_graph, (x, y), (time, s))

    def _density_residual(self, flow: MarginalFlow, t: Tensor, y: Tensor, stationary: bool) -> Tensor:
        def density(s: Tensor, z: Tensor) -> Tensor:
            return flow.log_prob(s, z).exp()

        rate = -self.density_rate(density, t, y)
        return rate if stationary else rate + time_derivative(density, t, y)


class ContinuityEquation(TransportOperator):
    r"""Transport along a given velocity field: the forward equation of an ordinary differential equation.

    .. math:: \partial_t\rho = -\nabla\cdot(b\rho)

    Use it where a velocity is at hand, as that of a probability flow; a diffusion has :class:`~stochdyn.FokkerPlanck`.

    Args:
        field: A field ``b(t, x) -> (..., d)``, a callable or module.

    Example:
        >>> from stochdyn.core import GaussianFlow
        >>> grow = GaussianFlow(lambda t: torch.zeros(*t.shape, 1), lambda t: (2 * t).exp()[..., None, None])
        >>> ContinuityEquation(lambda t, x: x).residual(grow, 0.5, torch.ones(1, 1)).abs() < 1e-6
        tensor([True])
    """

    def __init__(self, field: Field) -> None:
        super().__init__()
        if not callable(field):
            raise InvalidInputError(
                "field must be callable", got=type(field).__name__, expected="field(t, x)"
            )
        self.field = field

    def velocity(self, t: Tensor, x: Tensor, score: Tensor, probe: Tensor | None = None) -> Tensor:
        """Return the velocity ``(..., d)`` of a density with the given score ``(..., d)``."""
        return self.field(t, x)

    def flux(self, t: Tensor, x: Tensor, density: Tensor) -> Tensor:
        """Return the probability current ``(..., d)`` of a density ``(...)`` computed from ``x``."""
        return self.field(t, x) * density.unsqueeze(-1)
