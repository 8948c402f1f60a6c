"""Observations of a nonlinear equation as a Pyro distribution, with the path integrated out by an approximate Kalman filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, constraints

from stochdyn._checks import (
    as_tensor,
    check_callable,
    check_choice,
    check_event_size,
    check_positive,
    check_type,
)
from stochdyn.core.gaussian.feedback import start_lift
from stochdyn.core.gaussian.nonlinear import (
    EnsembleKalman,
    ExtendedKalman,
    GaussianStates,
    NonlinearKalman,
    UnscentedKalman,
    kalman_states,
)
from stochdyn.core.law.initial import DistributionStart, FixedStart, InitialLaw
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.stops import EulerTransitions
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.infer.seen import SeenEquation

__all__ = ["NonlinearObservations"]

_METHODS: dict[str, type[NonlinearKalman]] = {
    "ekf": ExtendedKalman,
    "ukf": UnscentedKalman,
    "enkf": EnsembleKalman,
}
Scale = Tensor | float | Callable[[Tensor], Tensor]


class NonlinearObservations(LawDistribution):
    r"""Noisy observations of a nonlinear equation, as a distribution with event ``(T, p)``; the path is integrated out.

    .. math:: dX=f(t,X)\,dt+G(t,X)\,dW,\qquad y_i=h(X_{t_i})+\sigma(X_{t_i})\,\epsilon_i

    The density is an approximate evidence: that of a filter which takes what is known of the path for Gaussian at all times. It
    can be differentiated in all parameters, so that stock NUTS moves through the parameters alone. The equation takes Euler
    steps on a grid through the times (``seen.stops.ts``), the same steps as :func:`sample_path` on that grid. For a linear equation
    the extended and the unscented filter are exact on that grid. :func:`particle_filter` says how far the approximation is off for yours.

    Args:
        sde: The equation. Parameters with batch axes broadcast with states ``(*batch, d)``, as in :class:`DiffusionPath`.
        initial: A distribution with event ``(d,)`` of which mean and covariance count, or a tensor for a fixed start.
        times: The strictly increasing times of the data, ``(T,)``, or ``(*batch, T)`` where every series has its own.
        observe: The function :math:`h` from states ``(..., d)`` to the means ``(..., p)`` of the observations.
        obs_scale: The standard deviation :math:`\sigma` of the observations: a number, ``(p,)`` or ``(*batch, p)``, or a function
            from states ``(..., d)`` to ``(..., p)``. For counts of mean ``h(x)`` it is the root of ``h(x)``.
        method: The filter: ``"ekf"``, ``"ukf"``, ``"enkf"``, or :class:`~stochdyn.infer.ExtendedKalman`,
            :class:`~stochdyn.infer.UnscentedKalman` or :class:`~stochdyn.infer.EnsembleKalman`, which owns options.
        start_time: The time at which ``initial`` holds, or one per series ``(*batch,)``; none of the times may be before it.
        dt: The largest Euler step, in the unit of the times. None takes steps so short that half of them would change the law of
            paths at the times by 0.005 nats at most, and so the log density by about 0.1: judged along paths from the start, the
            same number for all series, and anew for other parameters; a drift that says that it is affine
            (:class:`~stochdyn.core.AffineField`) takes exact steps. ``math.inf`` takes one step to each time.

    Raises:
        TimeGridError: If the times don't increase strictly, or begin before ``start_time``.
        ShapeError: If equation, start and observations don't fit each other.
        InvalidInputError: If a scale isn't positive, or the start has no known covariance.

    Example:
        >>> import stochdyn as sd
        >>> pendulum = sd.SDE(lambda t, x: torch.stack([x[..., 1], -x[..., 0].sin()], -1), 0.1)
        >>> y = NonlinearObservations(pendulum, torch.tensor([1.0, 0.0]), [0.5, 1.0], lambda x: x[..., :1], 0.1, dt=0.05)
        >>> y.event_shape, y.log_prob(torch.tensor([[0.9], [0.6]]))
        (torch.Size([2, 1]), tensor(2.2873))
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    _carried = ("seen", "times", "observe", "obs_scale", "method")

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        times: Any,
        observe: Callable[[Tensor], Tensor],
        obs_scale: Any,
        method: str | NonlinearKalman = "ekf",
        *,
        start_time: Tensor | float = 0.0,
        dt: float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_callable(observe, "observe", "a function from states to means of observations")
        if isinstance(method, str):
            check_choice(method, tuple(_METHODS), "method")
            method = _METHODS[method]()
        check_type(method, NonlinearKalman, "method")
        self.observe, self.method = observe, method
        self.seen = SeenEquation.at(sde, initial, times, start_time, dt)
        self.times = self.seen.times
        start_moments(self.seen.initial)
        probe, batch = self.seen.probe, self.seen.batch
        with torch.no_grad():
            shown = observe(probe)
        if not isinstance(shown, Tensor) or shown.ndim < 1:
            raise ShapeError("observe must return a tensor (..., p)", got=repr(shown)[:60])
        size = shown.shape[-1]
        own = torch.broadcast_shapes(batch, shown.shape[:-1])
        self.obs_scale: Scale = obs_scale
        if not callable(obs_scale):
            scale = as_tensor(obs_scale, "obs_scale", like=probe)
            check_positive(scale.detach(), "obs_scale")
            if scale.ndim:
                if scale.shape[-1] not in (1, size):
                    raise ShapeError(
                        "obs_scale doesn't fit the observations",
                        got=tuple(scale.shape),
                        expected=f"(..., {size})",
                    )
                own = torch.broadcast_shapes(own, scale.shape[:-1])
            self.obs_scale = scale
        super().__init__(own, torch.Size((self.times.shape[-1], size)), validate_args=validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, T, p)``: paths by Euler steps, observed with Gaussian noise."""
        shape = self._extended_shape(torch.Size(sample_shape))
        x = self.seen.states(tuple(shape[:-2]))
        mean = self.observe(x)
        scale = self._scale(x)
        return (mean + scale * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)).movedim(0, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density ``(*batch,)`` of ``value (..., T, p)``; NaN is missing."""
        return self._run(self._data(value), smooth=False).log_evidence

    def filter(self, value: Any) -> GaussianStates:
        """Return what the data up to each time say of the state there.

        A row of NaN at a later time is a forecast.

        Args:
            value: The data ``(..., T, p)`` of any kind, NaN where missing.
        """
        return self._run(self._data(value), smooth=False)

    def smooth(self, value: Any) -> GaussianStates:
        """Return what all data say of the states at their times.

        Args:
            value: The data ``(..., T, p)`` of any kind, NaN where missing; rows of NaN are times without data.
        """
        return self._run(self._data(value), smooth=True)

    def _data(self, value: Any) -> Tensor:
        return as_tensor(value, "value", like=self.seen.probe, missing=True)

    def _run(self, value: Tensor, smooth: bool) -> GaussianStates:
        check_event_size(value, self.event_shape[1], "value")
        check_event_size(value, self.event_shape[0], "value", -2)
        sde = self.seen.sde
        mean, cov = start_moments(self.seen.initial)
        chain = EulerTransitions(sde, self.seen.stops, mean)
        dim, size = mean.shape[-1], chain.size
        if size > dim:
            factor = sde.noise.initial_factor(dtype=mean.dtype, device=mean.device)
            lift = start_lift(mean, size, dim, factor, chain.channels)
            inner = torch.eye(lift.shape[-1], dtype=mean.dtype, device=mean.device)
            inner = inner.expand(*cov.shape[:-2], *inner.shape).clone()
            inner[..., :dim, :dim] = cov
            cov = lift @ inner @ lift.mT
            mean = torch.nn.functional.pad(mean, (0, size - dim))
        batch = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        start = mean.expand(*batch, size), cov.expand(*batch, size, size)
        return kalman_states(
            self.method,
            chain,
            start,
            lambda z: self.observe(z[..., :dim]),
            lambda z: torch.diag_embed(self._scale(z[..., :dim]).expand(*z.shape[:-1], self.event_shape[-1])),
            value,
            self.times,
            smooth=smooth,
        )

    def _scale(self, x: Tensor) -> Tensor:
        if isinstance(self.obs_scale, Tensor):
            return self.obs_scale.to(x.dtype)
        assert callable(self.obs_scale)
        return self.obs_scale(x)


def start_moments(initial: InitialLaw) -> tuple[Tensor, Tensor]:
    """Return mean ``(*batch, d)`` and covariance ``(*batch, d, d)`` of a start, differentiable.

    Raises:
        InvalidInputError: If the covariance of a distribution isn't known.
    """
    if isinstance(initial, FixedStart):
        point = initial.point
        return point, torch.zeros(point.shape[-1], point.shape[-1], dtype=point.dtype, device=point.device)
    if isinstance(initial, DistributionStart):
        law: Any = initial.distribution
        if isinstance(law, MultivariateNormal | LowRankMultivariateNormal):
            return law.mean, law.covariance_matrix
        if isinstance(law, Independent):
            return law.mean, torch.diag_embed(law.variance)
    raise InvalidInputError(
        "the start has no known covariance",
        got=type(initial).__name__,
        expected="a tensor, a MultivariateNormal, or a distribution with independent components",
    )
