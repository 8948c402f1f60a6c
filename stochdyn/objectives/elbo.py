"""The evidence lower bound of a latent path: expected log-likelihood minus the divergence of two path measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    as_time_grid,
    check_bool,
    check_callable,
    check_choice,
    check_event_size,
    check_inside,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_real,
    check_same_dtype,
    check_type,
    values_are_checked,
)
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, UnavailableError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["GaussianObservations", "PathELBO", "PathLikelihood"]

# Evaluations between looks at the spread of the log weights, where the numbers are on a GPU.
_LOOK = 16
# Under this variance of the log weights, in squared nats, the low-noise gradient is the better one.
_THRESHOLD = 4.0


class PathLikelihood(Protocol):
    """What scores paths: ``likelihood(path, batch) -> (*sample,)`` log densities of the data given each path."""

    def __call__(self, path: Path, batch: Any) -> Tensor:
        """Return ``log p(data | path)`` for every path."""


class GaussianObservations(nn.Module):
    r"""Independent Gaussian observations :math:`y_i\sim N(X_{t_i}, \sigma^2)` of a path at grid times.

    All of ``ts``, ``times``, ``values`` and ``obs_scale`` may be tensors, arrays, tables or lists; what isn't a tensor takes
    the precision of ``ts``. A value that is NaN wasn't observed and doesn't count in the likelihood.

    Use it for real-valued data with noise of known or learnt size; for others hand over a function of the path.

    Args:
        ts: The grid ``(T,)`` on which paths are simulated.
        times: The observation times ``(n,)``, each on or between grid points (linear interpolation in between).
        values: The observed values ``(n, d)``, or ``(n,)`` for one-dimensional paths; NaN where one is missing.
        obs_scale: The standard deviation of the observations, in units of the values: a number, or a tensor that
            broadcasts with ``(n, d)``. A Parameter is learnt.

    Attributes:
        seen: Which of the values ``(n, d)`` were observed.
        scale: The standard deviation, a buffer or the Parameter given.

    Raises:
        TimeGridError: If a time lies outside the grid.
        NonFiniteError: If a time or a scale isn't finite, or a value is infinite.
        EmptyDataError: If there are no observations, or all are missing.
        ShapeError: If times, values and scale don't fit.

    Example:
        >>> ts = torch.linspace(0, 1, 5)
        >>> y = GaussianObservations(ts, [0.5, 1.0], [0.3, float("nan")], obs_scale=0.5)
        >>> from stochdyn import PathSample
        >>> path = PathSample.of_states(ts, torch.zeros(2, 5, 1))
        >>> alone = GaussianObservations(ts, [0.5], [0.3], obs_scale=0.5)
        >>> torch.equal(y(path), alone(path))
        True
    """

    ts: Tensor
    values: Tensor
    seen: Tensor
    right: Tensor
    weight: Tensor
    scale: Tensor

    def __init__(self, ts: object, times: object, values: object, obs_scale: object) -> None:
        super().__init__()
        grid = as_time_grid(ts)
        y = _in_precision_of(
            grid, as_tensor(values, "values", (1, 2), "(n, d) or (n,)", like=grid, missing=True), values
        )
        check_nonempty(y, "values")
        at = as_tensor(times, "times", 1, "(n,)", like=grid).to(grid.dtype)
        check_inside(at, grid)
        y = y.unsqueeze(-1) if y.ndim == 1 else y
        if y.shape[0] != at.shape[0]:
            raise ShapeError("times and values differ in length", got=f"{at.shape[0]} and {y.shape[0]}")
        seen = ~torch.isnan(y)
        if not bool(seen.any()):
            raise EmptyDataError("values has no observation", got="NaN everywhere")
        scale = _in_precision_of(y, as_tensor(obs_scale, "obs_scale", like=y), obs_scale)
        check_positive(scale.detach(), "obs_scale")
        if not _broadcasts(scale.shape, y.shape):
            raise ShapeError(
                "obs_scale must broadcast with the values",
                got=f"shape {tuple(scale.shape)}",
                expected=tuple(y.shape),
            )
        right = torch.searchsorted(grid, at.contiguous()).clamp(1, grid.shape[0] - 1)
        weight = ((at - grid[right - 1]) / (grid[right] - grid[right - 1])).to(y.dtype)
        self.register_buffer("ts", grid)
        # Under a missing value stands a number, so that no gradient meets NaN; the mask takes its term away.
        self.register_buffer("values", torch.where(seen, y, torch.zeros_like(y)))
        self.register_buffer("seen", seen)
        self.register_buffer("right", right)
        self.register_buffer("weight", weight.unsqueeze(-1))
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)

    def forward(self, path: Path, batch: Any = None) -> Tensor:
        """Return ``(*sample,)`` log-likelihoods of the paths."""
        check_event_size(path.x, self.values.shape[-1], "path.x")
        check_same_dtype(path=path.x, values=self.values)
        states = torch.lerp(path.x[..., self.right - 1, :], path.x[..., self.right, :], self.weight)
        log_prob = torch.distributions.Normal(states, self.scale, validate_args=False).log_prob(self.values)
        return torch.where(self.seen, log_prob, torch.zeros_like(log_prob)).sum((-2, -1))


def _in_precision_of(like: Tensor, value: Tensor, given: object) -> Tensor:
    """Give data that didn't come as a tensor the precision of one that they go with."""
    return value if isinstance(given, Tensor) else value.to(like.dtype)


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, whole) == whole
    except RuntimeError:
        return False


class PathELBO(Objective):
    r"""Minus the evidence lower bound of a latent path.

    .. math::
        \mathrm{ELBO}=\mathbb E_Q\big[\log p(y\mid x)\big]-\mathrm{KL}(Q\,\|\,P)\ \le\ \log p(y)

    Use it outside Pyro, for one latent path under laws of your own; in a Pyro model
    :class:`~stochdyn.infer.AutoPathGuide` does the same.

    Args:
        prior: P, the law of the latent path.
        posterior: Q, a law with a density with respect to P: for diffusions usually ``prior.controlled(u, precision)``. How its
            paths are simulated, their integration method included, is a matter of the law.
        likelihood: A function that maps paths (and the batch) to log-likelihoods; if it has an attribute ``ts``, that
            is the grid.
        num_particles: The number of paths drawn per evaluation.
        estimator: The gradient of the divergence: ``"rate"``, ``"stl"``, ``"density"``, or ``"auto"``: ``"rate"`` while
            the log weights of the particles spread by more than ``auto_threshold``, then ``"stl"``. The value reported
            is always the true log weight.
        ts: The grid ``(T,)``; needed if the likelihood has none.
        importance_weighted: Whether to report and optimise the tighter bound :math:`\mathbb E\log\frac1S\sum_s w_s`
            (IWAE) instead.
        auto_threshold: The variance of the log weights, in squared nats, under which ``"auto"`` changes to ``"stl"``; 4
            if None.

    Raises:
        InvalidInputError: For an unknown estimator, or if no grid is given.

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

    grid: Tensor
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
        auto_threshold: float | None = None,
    ) -> None:
        super().__init__()
        check_type(prior, PathMeasure, "prior")
        check_type(posterior, PathMeasure, "posterior")
        check_choice(estimator, ("auto", "density", "rate", "stl"), "estimator")
        check_positive_int(num_particles, "num_particles")
        grid = ts if ts is not None else getattr(likelihood, "ts", None)
        if grid is None:
            raise InvalidInputError("no time grid", hint="give ts=..., or a likelihood with an attribute ts")
        grid = as_time_grid(grid)
        check_bool(importance_weighted, "importance_weighted")
        if auto_threshold is not None:
            check_real(auto_threshold, "auto_threshold", above=0.0)
            if estimator != "auto":
                raise InvalidInputError(
                    "auto_threshold does nothing for an estimator that is fixed",
                    got=f"estimator={estimator!r}",
                )
        check_callable(likelihood, "likelihood", "a module or function of a path and a batch")
        self.prior = prior
        self.posterior = posterior
        self.likelihood = likelihood
        self.num_particles = num_particles
        self.estimator = estimator
        self.importance_weighted = importance_weighted
        self.auto_threshold = _THRESHOLD if auto_threshold is None else auto_threshold
        self.register_buffer("grid", grid)
        self._evaluations, self._settled, self._only_density = 0, False, False
        # Running variance of the log weights: saved with the parameters, so that a resumed run chooses the same estimator.
        self.register_buffer("_spread", torch.full((), math.inf, dtype=torch.float64))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Draw paths of the posterior and evaluate the bound."""
        grid = self.grid
        path = self.posterior.sample(grid, self.num_particles)
        log_likelihood = self.likelihood(path, batch)
        if log_likelihood.shape != path.shape:
            raise ShapeError(
                "the likelihood must return one number per path",
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
            reported = self._ratio(path, "stl" if estimator == "stl" else "density")
        differentiated = self._ratio(path, "rate") if estimator == "rate" else reported
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

    def _ratio(self, path: Path, estimator: str) -> Tensor:
        """Return the log ratios by an estimator, by the density where the choice is free and a law knows nothing else."""
        try:
            return self.posterior.log_rn(path, self.prior, estimator, recorded=True)
        except UnavailableError:
            if self.estimator != "auto" or estimator == "density":
                raise
            self._only_density = True
            return self.posterior.log_rn(path, self.prior, "density", recorded=True)

    def _choose(self) -> str:
        if self.estimator != "auto":
            return self.estimator
        if self._only_density:
            return "density"
        # To look at a number on a GPU is to wait for it: there now and then is often enough.
        looks = self._spread.device.type == "cpu" and values_are_checked()
        if looks or self._evaluations % _LOOK == 0:
            self._settled = bool(self._spread < self.auto_threshold)
        self._evaluations += 1
        return "stl" if self._settled else "rate"

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the choice of the estimator depends on besides the buffers."""
        return {"evaluations": self._evaluations, "settled": self._settled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        self._evaluations, self._settled = int(state["evaluations"]), bool(state["settled"])

    @torch.no_grad()
    def _watch(self, log_weight: Tensor) -> None:
        if self.estimator != "auto" or self.num_particles < 2 or not self.training:
            return
        now = log_weight.var(0).mean().to(self._spread)
        smooth = 0.95 * self._spread + 0.05 * now
        self._spread.copy_(torch.where(torch.isinf(self._spread), now, smooth))

    @torch.no_grad()
    def evidence(self, num_samples: int = 1000, batch: Any = None) -> tuple[Tensor, Tensor]:
        """Estimate the log evidence by importance sampling with the posterior.

        Args:
            num_samples: The number of paths drawn.
            batch: What the likelihood is given besides the paths.

        Returns:
            The estimate ``(*batch,)`` and the log weights ``(num_samples, *batch)``.
        """
        check_positive_int(num_samples, "num_samples")
        path = self.posterior.sample(self.grid, num_samples)
        log_weight = self.likelihood(path, batch) - self.posterior.log_rn(path, self.prior, recorded=True)
        return torch.logsumexp(log_weight, 0) - math.log(num_samples), log_weight
