"""The evidence lower bound of a latent path: expected log-likelihood minus the divergence of two path measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    check_choice,
    check_event_size,
    check_finite,
    check_inside,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_same_dtype,
    check_time_grid,
    check_type,
)
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["GaussianObservations", "PathELBO", "PathLikelihood"]


class PathLikelihood(Protocol):
    """What scores paths: ``likelihood(path, batch) -> (*sample,)`` log densities of the data given each path."""

    def __call__(self, path: Path, batch: Any) -> Tensor:
        """Return ``log p(data | path)`` for every path."""


class GaussianObservations(nn.Module):
    r"""Independent Gaussian observations :math:`y_i\sim N(X_{t_i}, \sigma^2)` of a path at grid times.

    Args:
        ts: ``(T,)`` grid on which paths are simulated.
        times: ``(n,)`` observation times, each on or between grid points (linear interpolation in between).
        values: ``(n, d)``, or ``(n,)`` for one-dimensional paths.
        scale: standard deviation: a number or a tensor that broadcasts with ``(n, d)``.

    Raises:
        TimeGridError: if a time lies outside the grid.
        NonFiniteError: if a value isn't finite.
        EmptyDataError: if there are no observations.
    """

    ts: Tensor
    values: Tensor

    def __init__(self, ts: Tensor, times: Tensor, values: Tensor, scale: Tensor | float) -> None:
        super().__init__()
        check_time_grid(ts)
        check_nonempty(values, "values")
        check_finite(values, "values")
        check_finite(times, "times")
        check_inside(times, ts)
        if values.ndim == 1:
            values = values.unsqueeze(-1)
        if values.shape[0] != times.shape[0]:
            raise ShapeError(
                "times and values differ in length", got=f"{times.shape[0]} and {values.shape[0]}"
            )
        check_positive(scale if isinstance(scale, float | int) else scale.detach(), "scale")
        right = torch.searchsorted(ts, times.contiguous()).clamp(1, ts.shape[0] - 1)
        weight = ((times - ts[right - 1]) / (ts[right] - ts[right - 1])).to(values.dtype)
        self.register_buffer("ts", ts)
        self.register_buffer("values", values)
        self.register_buffer("right", right)
        self.register_buffer("weight", weight.unsqueeze(-1))
        self.scale = scale

    def forward(self, path: Path, batch: Any = None) -> Tensor:
        """Return ``(*sample,)`` log-likelihoods."""
        check_event_size(path.x, self.values.shape[-1], "path.x")
        check_same_dtype(path=path.x, values=self.values)
        right, weight = cast(Tensor, self.right), cast(Tensor, self.weight)
        states = torch.lerp(path.x[..., right - 1, :], path.x[..., right, :], weight)
        return torch.distributions.Normal(states, self.scale).log_prob(self.values).sum((-2, -1))


class PathELBO(Objective):
    r"""Minus the evidence lower bound of a latent path.

    .. math::
        \mathrm{ELBO}=\mathbb E_Q\big[\log p(y\mid x)\big]-\mathrm{KL}(Q\,\|\,P)\ \le\ \log p(y)

    Args:
        prior: P, the law of the latent path.
        posterior: Q, a law with a density with respect to P: for diffusions usually ``prior.controlled(u, precision)``. How its
            paths are simulated, their integration method included, is a matter of the law.
        likelihood: maps paths (and the batch) to log-likelihoods; if it has an attribute ``ts``, that is the grid.
        num_particles: paths drawn per evaluation.
        estimator: gradient of the divergence: ``"rate"``, ``"stl"``, ``"density"``, or ``"auto"``: ``"rate"`` while the log
            weights of the particles spread by more than ``auto_threshold``, then ``"stl"``. The value reported is
            always the true log weight.
        ts: ``(T,)`` grid; needed if the likelihood has none.
        importance_weighted: report and optimise the tighter bound :math:`\mathbb E\log\frac1S\sum_s w_s` (IWAE) instead.
        auto_threshold: variance of the log weights, in squared nats, under which ``"auto"`` changes to ``"stl"``.

    Raises:
        InvalidInputError: for an unknown estimator, or if no grid is given.

    Reference:
        Li, Wong, Chen and Duvenaud, "Scalable gradients for stochastic differential equations", 2020, section 5;
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016.

    Example:
        >>> from stochdyn.core import DiffusionMeasure, SDE
        >>> ts = torch.linspace(0, 1, 11)
        >>> prior = DiffusionMeasure(torch.zeros(1), SDE(lambda t, x: -x, 1.0))
        >>> likelihood = GaussianObservations(ts, ts[[5, 10]], torch.tensor([0.3, 0.1]), 0.5)
        >>> value = PathELBO(prior, prior.controlled(lambda t, x: 0.2 - x), likelihood)(None)
        >>> value.bound
        'evidence_lower'
    """

    _spread: Tensor

    def __init__(
        self,
        prior: PathMeasure,
        posterior: PathMeasure,
        likelihood: PathLikelihood | Callable[[Any, Any], Tensor],
        num_particles: int = 8,
        estimator: str = "auto",
        *,
        ts: Tensor | None = None,
        importance_weighted: bool = False,
        auto_threshold: float = 4.0,
    ) -> None:
        super().__init__()
        check_type(prior, PathMeasure, "prior")
        check_type(posterior, PathMeasure, "posterior")
        check_choice(estimator, ("auto", "density", "rate", "stl"), "estimator")
        check_positive_int(num_particles, "num_particles")
        grid = ts if ts is not None else getattr(likelihood, "ts", None)
        if grid is None:
            raise InvalidInputError("no time grid", hint="give ts=..., or a likelihood with an attribute ts")
        check_time_grid(grid)
        self.prior = prior
        self.posterior = posterior
        self.likelihood = likelihood
        self.num_particles = num_particles
        self.estimator = estimator
        self.importance_weighted = importance_weighted
        self.auto_threshold = auto_threshold
        self.register_buffer("grid", grid)
        # Running variance of the log weights: saved with the parameters, so that a resumed run chooses the same estimator.
        self.register_buffer("_spread", torch.full((), math.inf, dtype=torch.float64))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Draw paths of the posterior and evaluate the bound."""
        grid = cast(Tensor, self.grid)
        path = self.posterior.sample(grid, self.num_particles)
        log_likelihood = self.likelihood(path, batch)
        if log_likelihood.shape != path.shape:
            raise ShapeError(
                "the likelihood must return one number a path",
                got=f"shape {tuple(log_likelihood.shape)}",
                expected=f"{tuple(path.shape)}",
            )
        if self.importance_weighted:
            log_weight = log_likelihood - self.posterior.log_rn(path, self.prior, recorded=True)
            bound = torch.logsumexp(log_weight, 0) - math.log(self.num_particles)
            elbo = bound.sum()
            return ObjectiveValue(-elbo, {"elbo": elbo.detach()}, "evidence_lower")
        estimator = self._choose()
        with torch.set_grad_enabled(torch.is_grad_enabled() and estimator != "rate"):
            value = "stl" if estimator == "stl" else "density"
            reported = self.posterior.log_rn(path, self.prior, value, recorded=True)
        differentiated = reported
        if estimator == "rate":
            differentiated = self.posterior.log_rn(path, self.prior, "rate", recorded=True)
        self._watch(log_likelihood.detach() - reported.detach())
        surrogate = (log_likelihood - differentiated).mean(0).sum()
        elbo = (log_likelihood - reported).detach().mean(0).sum()
        # Value of the true bound, gradient of the chosen estimator.
        loss = -(surrogate + (elbo - surrogate.detach()))
        terms = {
            "elbo": elbo,
            "log_likelihood": log_likelihood.detach().mean(0).sum(),
            "kl": reported.detach().mean(0).sum(),
        }
        return ObjectiveValue(loss, terms, "evidence_lower")

    def _choose(self) -> str:
        if self.estimator != "auto":
            return self.estimator
        return "stl" if self._settled() else "rate"

    def _settled(self) -> bool:
        return bool(self._spread < self.auto_threshold)

    @torch.no_grad()
    def _watch(self, log_weight: Tensor) -> None:
        if self.estimator != "auto" or self.num_particles < 2 or not self.training:
            return
        now = log_weight.var(0).mean().to(self._spread)
        smooth = 0.95 * self._spread + 0.05 * now
        self._spread.copy_(torch.where(torch.isinf(self._spread), now, smooth))

    @torch.no_grad()
    def evidence(self, num_paths: int = 1000, batch: Any = None) -> tuple[Tensor, Tensor]:
        """Return the importance-sampling estimate of the log evidence and the log weights ``(num_paths,)``."""
        path = self.posterior.sample(cast(Tensor, self.grid), num_paths)
        log_weight = self.likelihood(path, batch) - self.posterior.log_rn(path, self.prior, recorded=True)
        return torch.logsumexp(log_weight, 0) - math.log(num_paths), log_weight
