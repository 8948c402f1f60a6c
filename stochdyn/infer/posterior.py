"""Posterior laws of paths as Pyro distributions: what path guides sample from."""

from __future__ import annotations

from typing import Any, Self

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from stochdyn.core.law.diffusion import check_explosion
from stochdyn.core.law.girsanov import explicit_stop
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.core.sde.methods import Method
from stochdyn.core.sde.solvers import full_state, integrate
from stochdyn.infer.distributions import DiffusionPath, PathIncrements
from stochdyn.infer.driven import DrivenPath
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.infer.shaping import base_increments, log_shrinkage
from stochdyn.infer.start import StartPosterior

__all__ = ["IncrementPosterior", "PathPosterior"]

# Pyro's sign that nothing needs a score-function gradient; its annotation asks for a tensor.
_ZERO: Any = 0


class _FeedbackLaw(LawDistribution):
    """What both posterior laws share: the loop under feedback, and the two score forms."""

    has_rsample = True
    sde: SDE
    ts: Tensor
    feedback: Feedback
    estimator: str
    #: The solver under which the density is exact: that of the path in noise space, Euler's in state space.
    method: str | Method = "euler"

    def _fill(self, new: Self, batch_shape: torch.Size) -> None:
        new._last = None

    def _run(self, x0: Tensor, memory0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return states ``x``, full states ``z`` and increments ``e (N, *batch, M)``, time leading."""
        scale = self.feedback.scale
        batch = torch.broadcast_shapes(x0.shape[:-1], scale.shape[1:-1])
        standard = torch.randn(scale.shape[0], *batch, scale.shape[-1], dtype=x0.dtype, device=x0.device)
        noise = standard * _lead(scale, standard.ndim)
        controlled = self.sde.with_control(self.feedback.before(self.sde.control))
        run = integrate(controlled, x0, self.ts, noise, memory0, method=self.method)
        check_explosion(self.ts, run.x)
        z = full_state(run.x, run.memory)
        before = z[:-1]
        t = time_column(self.ts[..., :-1], before)
        factor = _lead(self.feedback.law.factor, noise.ndim + 1)
        spread = (factor @ standard.unsqueeze(-1)).squeeze(-1)
        return run.x, z, (self.feedback.mean(t, before) + spread) * _lead(scale, noise.ndim)

    def _log_q(self, e: Tensor, z: Tensor) -> Tensor:
        return self.feedback.log_prob(e, z, time_column(self.ts[..., :-1], z))

    def _entropy_term(self, e: Tensor, z: Tensor) -> Tensor:
        """Return the term to differentiate: its expected gradient is that of the log density."""
        if self.estimator == "stl":
            return explicit_stop(lambda inputs: self._log_q(*inputs), (e, z))
        if self.estimator == "rate":
            scale = _lead(self.feedback.scale, e.ndim)
            base = torch.distributions.Normal(torch.zeros_like(scale), scale).log_prob(e).sum(-1).sum(0)
            return base + self.feedback.divergence_rate(z, time_column(self.ts[..., :-1], z))
        return self._log_q(e, z)


class IncrementPosterior(_FeedbackLaw):
    """Posterior of the increments of a path, event ``(T-1, m R)``: guides a :class:`PathIncrements` site.

    Args:
        prior: The site's distribution in the model.
        feedback: The law of the increments given the state.
        estimator: ``"stl"``, ``"rate"`` or ``"density"``, the gradient of the divergence.
    """

    support = constraints.independent(constraints.real, 2)
    _carried = ("prior", "sde", "x0", "ts", "memory0", "method", "feedback", "estimator", "driven")

    def __init__(self, prior: PathIncrements, feedback: Feedback, estimator: str) -> None:
        self.prior, self.method = prior, prior.method
        self.sde, self.x0, self.ts, self.memory0 = prior.sde, prior.x0, prior.ts, prior.memory0
        self.feedback = feedback
        self.estimator = estimator
        self.driven = DrivenPath()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw increments by running the path under feedback."""
        batch = self._extended_shape(torch.Size(sample_shape))[:-2]
        x0 = self.x0.expand(*torch.broadcast_shapes(batch, self.x0.shape[:-1]), self.x0.shape[-1])
        x, z, e = self._run(x0, self.memory0)
        value = e.movedim(0, -2)
        self.driven.set(self.prior, value, x, z)
        self._last = (value, e, z[:-1])
        return value

    def _states(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is not None and self._last[0] is value:
            return self._last[1:]
        e = value.movedim(-2, 0)
        x0 = self.x0.expand(*torch.broadcast_shapes(e.shape[1:-1], self.x0.shape[:-1]), self.x0.shape[-1])
        run = integrate(self.sde, x0, self.ts, e, self.memory0, method=self.method)
        return e, full_state(run.x, run.memory)[:-1]

    def path(self, value: Tensor) -> Tensor:
        """Return the path ``(*batch, T, d)`` that increments drive."""
        x = self.driven.path(self.prior, value)
        if x is None:
            # Somebody else has set the increments (by conditioning the guide, say).
            x0 = self.x0.expand(*value.shape[:-2], self.x0.shape[-1])
            e = value.movedim(-2, 0)
            x = integrate(self.sde, x0, self.ts, e, self.memory0, method=self.method).x
        return x.movedim(0, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density."""
        return self._log_q(*self._states(value))

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Report the exact density, differentiate the estimator."""
        e, z = self._states(x)
        log_q = self._log_q(e, z)
        if self.estimator == "density":
            return ScoreParts(log_q, _ZERO, log_q)
        return ScoreParts(log_q, _ZERO, self._entropy_term(e, z))


class PathPosterior(_FeedbackLaw):
    """Posterior of a path in state space, event ``(T, d)``: the guide of a :class:`DiffusionPath` site.

    Args:
        prior: The site's distribution in the model.
        feedback: The law of the increments given the state.
        estimator: The gradient of the divergence, as in :class:`IncrementPosterior`.
        start: The posterior of a random start; None for a fixed one.
    """

    _carried = ("sde", "prior", "ts", "feedback", "estimator", "start")

    def __init__(
        self, prior: DiffusionPath, feedback: Feedback, estimator: str, start: StartPosterior | None
    ) -> None:
        self.sde, self.ts, self.prior = prior.sde, prior.ts, prior
        self.feedback = feedback
        self.estimator = estimator
        self.start = start
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """As the model's."""
        return self.prior.support

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw paths under feedback."""
        sample = torch.Size(sample_shape)
        if self.start is None:
            x0 = self.prior.draw_start(()).expand(*sample, *self.batch_shape, self.event_shape[-1])
        else:
            x0 = self.start.draw(sample, self.batch_shape)
        x, z, e = self._run(x0, None)
        value = x.movedim(0, -2)
        self._last = (value, e, z[:-1])
        return value

    def _states(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is not None and self._last[0] is value:
            return self._last[1:]
        x = value.movedim(-2, 0)
        before = x[:-1]
        t, dt = time_column(self.ts[..., :-1], before), steps_of(self.ts, before)
        excess = x[1:] - before - self.sde.drift(t, before) * dt
        dw = self.sde.diffusion(t, before).solve(excess)
        return base_increments(self.sde, self.ts, before, dw), before

    def _log_jacobian(self, z: Tensor) -> Tensor:
        """Return the log volume change from increments to states."""
        t = time_column(self.ts[..., :-1], z)
        log_det = self.sde.diffusion(t, z).log_det(z.shape[-1]) + log_shrinkage(self.sde, self.ts, z)
        return log_det.expand(z.shape[:-1]).sum(0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density on the grid."""
        e, z = self._states(value)
        return self._log_q(e, z) - self._log_jacobian(z) + self._log_start(z[0])

    def _log_start(self, x0: Tensor) -> Tensor:
        return x0.new_zeros(x0.shape[:-1]) if self.start is None else self.start.law.log_prob(x0)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Report the exact density, differentiate the estimator."""
        e, z = self._states(x)
        jacobian = self._log_jacobian(z)
        log_q = self._log_q(e, z) - jacobian + self._log_start(z[0])
        if self.estimator == "density":
            return ScoreParts(log_q, _ZERO, log_q)
        x0 = z[0]
        start = self._log_start(x0)
        if self.estimator == "stl":
            start = explicit_stop(lambda inputs: self._log_start(*inputs), (x0,))
        return ScoreParts(log_q, _ZERO, self._entropy_term(e, z) - jacobian + start)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *batch, ...)`` sample axes after time until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
