"""The most probable path of a site, and the posterior of the model linearised around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stochdyn.core.gaussian.feedback import LinearFeedback
from stochdyn.core.gaussian.small import times
from stochdyn.errors import NonFiniteError
from stochdyn.infer.distributions import PathIncrements
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import LinearPosterior, Quadratic, linear_posterior
from stochdyn.infer.view import SiteView

__all__ = ["LinearStart", "fit_linearised", "linear_feedback"]


@dataclass(frozen=True)
class LinearStart:
    """A linearised posterior and the path that it was taken around.

    Attributes:
        posterior: The posterior with its gains in absolute coordinates.
        states: ``(T, *batch, Z)`` its mean path.
        increments: ``(N, *batch, M)`` that drive it.
        start_mean: ``(*batch, D)`` posterior mean of a random start, or None.
        start_factor: ``(*batch, D, D)`` the Cholesky factor of its covariance, or None.
    """

    posterior: LinearPosterior
    states: Tensor
    increments: Tensor
    start_mean: Tensor | None
    start_factor: Tensor | None

    def value(self, view: SiteView) -> Tensor:
        """Return the mean path (or its increments) in the layout of the site."""
        if isinstance(view.fn, PathIncrements):
            return self.increments.movedim(0, -2)
        return self.states[..., : view.dim].movedim(0, -2)


@dataclass(frozen=True)
class _Point:
    """A path on the way to the most probable one, and how good it is."""

    states: Tensor  # (T, *batch, Z)
    increments: Tensor  # (N, *batch, M)
    start: Tensor | None  # (*batch, D)
    data: Quadratic
    score: Tensor  # (*batch,)


def fit_linearised(
    view: SiteView, quadratic: Callable[[Tensor], Quadratic], iterations: int = 25, tolerance: float = 1e-6
) -> LinearStart:
    """Iterate linearisation and smoothing to the most probable path: the iterated extended smoother.

    Steps are halved, for each series by itself, until the path is no less probable than before.

    Args:
        view: The site as the model presents it.
        quadratic: The expansion of the log-likelihood around a path ``(T, *batch, d)``.
        iterations: The largest number of iterations.
        tolerance: The relative change of the path at which to stop.

    Raises:
        NonFiniteError: If the path without noise, or its likelihood, isn't finite.

    Reference:
        Bell, "The iterated Kalman smoother as a Gauss-Newton method", 1994; Li and Todorov, "Iterative linear
        quadratic regulator design for nonlinear biological movement systems", 2004.
    """

    def judge(e: Tensor, z: Tensor, start: Tensor | None, safe: Tensor) -> _Point:
        finite = torch.isfinite(z).all(-1).all(0)
        z = torch.where(finite.unsqueeze(-1), z, safe)
        data = quadratic(z[..., : view.dim])
        score: Any = torch.where(finite, data.value, -torch.inf)  # type: ignore[arg-type]
        units = view.units(e.ndim)
        score = score - 0.5 * ((e / units) ** 2).sum(-1).sum(0)
        if view.start is not None and start is not None:
            excess = (start - view.start.mean).unsqueeze(-1)
            score = score - 0.5 * (excess.mT @ view.start.precision @ excess)[..., 0, 0]
        return _Point(z, e, start, data, score)

    with torch.no_grad():
        start = None if view.start is None else view.start.mean
        still = view.run(view.zero_increments(), start)
        point = judge(view.zero_increments(), still, start, torch.zeros_like(still))
        if not bool(torch.isfinite(point.score).all()):
            point = _held_still(view, judge, point, start)
        for _ in range(iterations):
            posterior = _linearised(view, point)
            mean = factor = None
            if view.start is not None:
                mean, factor = view.start.posterior(posterior.start_precision, posterior.start_linear)
                mean, factor = mean.to(point.states.dtype), factor.to(point.states.dtype)
            previous, point = point, _improve(view, judge, point, posterior, mean)
            if _stands_still(previous, point, tolerance):
                break
    held = _held(view, point, posterior)
    posterior = replace(posterior, law=replace(posterior.law, offset=held))
    return LinearStart(posterior, point.states, point.increments, point.start, factor)


def _held_still(
    view: SiteView,
    judge: Callable[[Tensor, Tensor, Tensor | None, Tensor], _Point],
    point: _Point,
    start: Tensor | None,
) -> _Point:
    """Return a point from which to search where the path without noise explodes or makes the data impossible.

    Series that are in order stay as they are; the others are held at their starts by noise.
    """
    held = view.held_still(start)
    if held is not None:
        e, z = held
        lost = ~torch.isfinite(point.score).unsqueeze(-1)
        e, z = (torch.where(lost, new, old) for new, old in ((e, point.increments), (z, point.states)))
        point = judge(e, z, start, z)
    if not bool(torch.isfinite(point.score).all()):
        raise NonFiniteError(
            "the model can't be linearised: neither its path without noise nor one held at its start has a finite likelihood",
            got=f"log-likelihood {point.score.flatten().tolist()}",
            hint="take a finer grid, or coordinates in which the state can't leave its range (sde.transformed('log'))",
        )
    return point


def _stands_still(before: _Point, after: _Point, tolerance: float) -> bool:
    """Return whether every series has come to rest, each component in its own scale, or gains nothing any more."""
    change = (after.states - before.states).abs().amax(0)
    rest = (change <= tolerance * after.states.abs().amax(0)).all(-1)
    gain = (after.score - before.score).abs()
    rounding = 8 * torch.finfo(gain.dtype).eps * after.score.abs()
    return bool((rest | (gain <= rounding)).all())


def _linearised(view: SiteView, point: _Point) -> LinearPosterior:
    """Return the posterior of the model linearised around a path, in float64."""
    return linear_posterior(view.linear_steps(point.states, point.increments), point.data)


def _held(view: SiteView, point: _Point, posterior: LinearPosterior) -> Tensor:
    """Return the offset with which the feedback law's mean path is the given one."""
    units = view.units(point.increments.ndim)
    states = linear_feedback(view, posterior, point.states).remembered(point.states[:-1])
    return (point.increments / units).double() - times(posterior.law.gain, states.double())


def _improve(
    view: SiteView,
    judge: Callable[[Tensor, Tensor, Tensor | None, Tensor], _Point],
    point: _Point,
    posterior: LinearPosterior,
    start: Tensor | None,
) -> _Point:
    """Step towards the linearised posterior, in each series as far as that makes its path more probable."""
    held = _held(view, point, posterior)
    slack = 100 * torch.finfo(point.score.dtype).eps * (1 + point.score.abs())
    step = torch.ones_like(point.score)
    for _ in range(9):
        share = step.double().unsqueeze(-1)
        offset = held + share * (posterior.law.offset - held)
        mixed = replace(posterior, law=replace(posterior.law, offset=offset))
        begin = start
        if start is not None and point.start is not None:
            begin = point.start + step.unsqueeze(-1) * (start - point.start)
        e, z = view.follow(linear_feedback(view, mixed, point.states), begin)
        trial = judge(e, z, begin, point.states)
        worse = ~(trial.score >= point.score - slack) & (step > 0)
        if not bool(worse.any()):
            return trial
        # Where many halvings don't help, this series is left where it is.
        half = torch.where(step > 2.0**-7, 0.5 * step, torch.zeros_like(step))
        step = torch.where(worse, half, step)
    return trial


def linear_feedback(view: SiteView, posterior: LinearPosterior, like: Tensor) -> Feedback:
    """Return the feedback of a linearised posterior, in the state's precision."""
    law, coupling = posterior.law, posterior.coupling
    assert law.centre is not None
    parts = (x.to(like.dtype) for x in (law.offset, law.gain, law.factor, law.centre))
    return Feedback(
        LinearFeedback(*parts), view.scale, coupling=None if coupling is None else coupling.to(like)
    )
