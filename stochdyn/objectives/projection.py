"""Projection of a law on paths onto a family of SDEs: the drift that is nearest in relative entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_finite
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["DriftProjection", "PathProjection", "project_linear_drift"]

Field = Callable[[Tensor, Tensor], Tensor]
Estimator = Literal["rate", "density"]


@dataclass(frozen=True)
class _Steps:
    """Every step of every path, time leading."""

    t: Tensor
    x: Tensor
    dt: Tensor
    increment: Tensor


def _steps(path: PathSample, sde: SDE, estimator: str) -> _Steps:
    check_choice(estimator, ("rate", "density"), "estimator")
    if sde.noise.num_states:
        raise InvalidInputError("noise with memory has no drift projection", got=type(sde.noise).__name__)
    states = path.leading()
    column = (-1, *(1,) * (states.ndim - 1))
    ts = path.ts.reshape(column)
    t, x, dt = ts[:-1], states[:-1], (ts[1:] - ts[:-1]).to(states.dtype)
    increment = states[1:] - x
    if estimator == "rate":
        coefficient = sde.diffusion(t, x)
        if path.dw.shape[-1] != coefficient.noise_dim(x.shape[-1]):
            raise ShapeError(
                "the path was driven by another number of channels",
                got=path.dw.shape[-1],
                expected=coefficient.noise_dim(x.shape[-1]),
                hint="estimator='density' needs no driving increments",
            )
        increment = increment - coefficient.apply(path.dw.movedim(-2, 0))
    return _Steps(t, x, dt, increment)


@dataclass(frozen=True)
class DriftProjection:
    r"""The nearest drift of a family that is linear in its parameters.

    Attributes:
        parameters: ``(k,)`` the minimiser.
        information: ``(k, k)`` curvature of the objective summed over paths, prior included. With
            ``estimator="density"``, paths that are data and a Gaussian prior, its inverse is the posterior
            covariance.
        kl: ``()`` mean over paths of the objective at the minimiser. With ``estimator="rate"`` an estimate of
            the divergence of the two laws given the start; with ``"density"`` that up to a constant.
    """

    parameters: Tensor
    information: Tensor
    kl: Tensor

    @property
    def covariance(self) -> Tensor:
        """``(k, k)`` inverse of the information."""
        return torch.linalg.inv(self.information)


def project_linear_drift(
    path: PathSample,
    features: Field,
    sde: SDE,
    *,
    estimator: Estimator = "rate",
    path_weights: Tensor | None = None,
    prior_precision: Tensor | float = 0.0,
    prior_mean: Tensor | float = 0.0,
) -> DriftProjection:
    r"""Project sampled paths on the drifts :math:`f_\theta=f_0+\sum_k\theta_k\phi_k`, by least squares.

    .. math::
        \min_\theta\; \mathrm{KL}(Q\,\|\,R_\theta) + \tfrac12(\theta-\mu)^\top\Lambda(\theta-\mu)
        = \min_\theta\; \tfrac12\,\mathbb E_Q\sum_n\bigl|G^+(f_Q-f_\theta)\bigr|^2\Delta_n + \dots

    Args:
        path: samples of :math:`Q`, ``x (*sample, T, d)``.
        features: :math:`\phi`, ``features(t, x) -> (..., d, k)``, called with time leading.
        sde: the offset :math:`f_0` is its drift, and :math:`G` its diffusion, shared by :math:`Q`. Components
            that no noise reaches are left out: there the drifts must agree anyway.
        estimator: ``"rate"`` takes :math:`f_Q\Delta` from the path and its driving increments, free of their
            noise (exact on an Euler grid); ``"density"`` takes whole increments, and needs no ``path.dw``.
        path_weights: ``(*sample,)`` non-negative weights of the paths; ones if None.
        prior_precision: :math:`\Lambda`, a number (times the identity) or ``(k, k)``, against the sum over
            paths.
        prior_mean: :math:`\mu`, a number or ``(k,)``.

    Returns:
        The minimiser, its information and the objective there.

    Raises:
        ShapeError: if features, weights or driving increments don't fit.
        InvalidInputError: if the features are linearly dependent on these paths and there is no prior.
        NonFiniteError: if the path isn't finite.

    Example:
        >>> from stochdyn.core import DiffusionMeasure
        >>> ou = DiffusionMeasure(torch.ones(1), SDE(lambda t, x: -2.0 * x, 0.5))
        >>> path = ou.sample(torch.linspace(0, 1, 11), (4,))
        >>> family = SDE(lambda t, x: torch.zeros_like(x), 0.5)
        >>> fit = project_linear_drift(path, lambda t, x: x[..., None], family)
        >>> fit.parameters.round(decimals=3)
        tensor([-2.])

    Reference:
        Liptser and Shiryaev, "Statistics of Random Processes", 2001, chapter 17.
    """
    check_finite(path.x.detach(), "path.x")
    steps = _steps(path, sde, estimator)
    coefficient = sde.diffusion(steps.t, steps.x)
    phi = features(steps.t, steps.x)
    if phi.ndim != steps.x.ndim + 1 or phi.shape[-2] != steps.x.shape[-1]:
        raise ShapeError("features don't fit the state", got=tuple(phi.shape), expected=(*steps.x.shape, "k"))
    offset = _drift(sde, steps)
    # columns lead, so that the batch axes of the coefficient still align from the right
    white = coefficient.solve(phi.movedim(-1, 0).expand(phi.shape[-1], *steps.x.shape)).movedim(0, -1)
    target = coefficient.solve(steps.increment - offset * steps.dt)
    weights = torch.ones_like(path.x[..., 0, 0]) if path_weights is None else path_weights
    if weights.shape != path.shape:
        raise ShapeError(
            "there must be one weight a path", got=tuple(weights.shape), expected=tuple(path.shape)
        )
    shared = weights[None, ..., None, None]
    gram = _flat(white * (shared * steps.dt[..., None])).mT @ _flat(white)
    moment = _flat(white * shared).mT @ target.reshape(-1)
    k = gram.shape[0]
    precision = torch.as_tensor(prior_precision, dtype=gram.dtype, device=gram.device)
    precision = (
        precision * torch.eye(k, dtype=gram.dtype, device=gram.device) if precision.ndim == 0 else precision
    )
    mean = torch.as_tensor(prior_mean, dtype=gram.dtype, device=gram.device).expand(k)
    information = gram + precision
    parameters = _solve(information, moment + precision @ mean)
    # written so that only the cross term is noisy when whole increments are used
    fit = (white @ parameters[:, None]).squeeze(-1)
    excess = 0.5 * fit.square() * steps.dt - fit * target
    if estimator == "rate":
        excess = excess + 0.5 * target.square() / steps.dt
    kl = (weights * excess.sum((0, -1))).sum() / weights.sum()
    return DriftProjection(parameters, information, kl)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _solve(information: Tensor, moment: Tensor) -> Tensor:
    scale = information.diagonal().clamp_min(torch.finfo(information.dtype).tiny).rsqrt()
    scaled = scale[:, None] * information * scale
    smallest = torch.linalg.eigvalsh(scaled.detach())[0]
    if not bool(smallest > 10 * information.shape[0] * torch.finfo(information.dtype).eps):
        raise InvalidInputError(
            "the features are linearly dependent on these paths",
            got=f"smallest relative eigenvalue {float(smallest):.3g}",
            hint="drop features, add paths, or give a prior_precision",
        )
    return scale * torch.linalg.solve(scaled, scale * moment)


def _drift(sde: SDE, steps: _Steps) -> Tensor:
    drift = sde.drift(steps.t, steps.x)
    if sde.control is not None and sde.control.drift is not None:
        drift = drift + sde.diffusion(steps.t, steps.x).apply(sde.control.drift(steps.t, steps.x))
    return drift.expand_as(steps.x)


class PathProjection(Objective):
    r"""Divergence of sampled paths from an SDE with learned drift, as an objective.

    .. math:: \mathrm{KL}(Q\,\|\,R_\theta) = \tfrac12\,\mathbb E_Q\sum_n |G^+(f_Q-f_\theta)|^2\,\Delta_n

    given the start, and with it an upper bound on the divergence of any marginals. The diffusion is shared by
    both laws, so it can't be learned here.

    Args:
        sde: the family, :math:`f_\theta` with its parameters, and :math:`G`.
        paths: draws a :class:`PathSample` when the objective is called without a batch.
        estimator: ``"rate"`` as in :func:`project_linear_drift`; ``"density"`` has the same gradient in
            expectation, needs no driving increments, and is the divergence up to a constant, so its ``bound``
            is ``"surrogate"``.

    Raises:
        InvalidInputError: if the estimator is unknown.

    Example:
        >>> from stochdyn.core import DiffusionMeasure
        >>> law = DiffusionMeasure(torch.ones(1), SDE(lambda t, x: -x, 1.0))
        >>> path = law.sample(torch.linspace(0, 1, 11), (4,))
        >>> value = PathProjection(SDE(lambda t, x: 1.0 - x, 1.0))(path)
        >>> value.loss, value.bound
        (tensor(0.5000), 'kl_upper')
    """

    def __init__(
        self, sde: SDE, paths: Callable[[], PathSample] | None = None, estimator: Estimator = "rate"
    ) -> None:
        super().__init__()
        check_choice(estimator, ("rate", "density"), "estimator")
        self.sde, self.paths, self.estimator = sde, paths, estimator

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on a :class:`PathSample`, or on ``(path, weights)`` with weights ``(*sample,)``.

        Raises:
            InvalidInputError: if there are neither paths nor a sampler.
            ShapeError: if driving increments don't fit.
        """
        if batch is None:
            if self.paths is None:
                raise InvalidInputError("there are no paths", hint="pass a PathSample, or give paths=...")
            batch = self.paths()
        path, weights = batch if isinstance(batch, tuple) else (batch, None)
        steps = _steps(path.detach(), self.sde, self.estimator)
        coefficient = self.sde.diffusion(steps.t, steps.x)
        drift = _drift(self.sde, steps)
        if self.estimator == "rate":
            gap = coefficient.solve(steps.increment / steps.dt - drift)
            values = 0.5 * (gap.square() * steps.dt).sum((0, -1))
        else:
            pull = coefficient.solve(drift)
            move = coefficient.solve(steps.increment)
            values = (0.5 * pull.square() * steps.dt - pull * move).sum((0, -1))
        loss = values.mean() if weights is None else (weights * values).sum() / weights.sum()
        name = "path_kl" if self.estimator == "rate" else "path_kl_shifted"
        return ObjectiveValue(
            loss, {name: loss.detach()}, "kl_upper" if self.estimator == "rate" else "surrogate"
        )
