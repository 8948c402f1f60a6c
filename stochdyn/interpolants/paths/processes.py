"""Noising processes with affine drift: Ornstein-Uhlenbeck, variance-preserving, -exploding, mean-reverting."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_floating,
    check_inside,
    check_ndim,
    check_not_before,
    check_points,
    check_positive_int,
    check_real,
    check_time_broadcast,
    of_times,
)
from stochdyn.core.sde.coefficients import Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["OU", "VE", "VP", "AffineProcess", "MeanReverting"]


class AffineProcess(nn.Module, ABC):
    r"""A diffusion that turns data into noise, with Gaussian kernels in closed form.

    .. math::
        dX_t = F(t)(X_t-\mu)\,dt + g(t)\,dW_t,\qquad
        X_t\mid X_0 \sim N\!\big(\mu + a_t(X_0-\mu),\ \sigma_t^2 I\big),\qquad a_t = e^{\int_0^tF}

    Subclasses give the logarithm of :math:`a`, the rate :math:`F`, the variance :math:`\sigma^2` and the inverse of the log
    signal-to-noise ratio :math:`\lambda=\log(a/\sigma)`, which always falls with time:
    :math:`\dot\lambda=-g^2/(2\sigma^2)`. Times are tensors of any shape.

    Which process? :class:`VP` for standardised data, where nothing else speaks for another; :class:`VE` for data of a scale that must not
    shrink on the way, such as residuals or fields with physical units; :class:`OU` for exact comparisons, its coefficients being constant;
    :class:`MeanReverting` for restoration, where the process ends at the degraded item rather than at pure noise.

    Args:
        horizon: The last time T, at which nothing but noise is left.
        start: The first time that is learned, and at which sampling stops, between 0 and the horizon.
        mean: What the process reverts to, a number or ``(d,)``; or ``(n, d)`` with one mean for each of n items.

    Raises:
        InvalidInputError: If not ``0 < start < horizon``.
    """

    mean: Tensor

    def __init__(self, horizon: float, start: float, mean: Tensor | float = 0.0) -> None:
        super().__init__()
        check_real(start, "start", above=0.0)
        check_real(horizon, "horizon", above=0.0)
        if not start < horizon:
            raise InvalidInputError(
                "a process needs 0 < start < horizon", got=f"start={start}, horizon={horizon}"
            )
        self.register_buffer("mean", _as_mean(mean))
        self.horizon, self.start = float(horizon), float(start)

    def with_mean(self, mean: Tensor | float) -> AffineProcess:
        """Return the same process about another mean: a number, ``(d,)``, or ``(n, d)`` for one mean per item."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.mean = _as_mean(mean)
        return other

    @abstractmethod
    def log_scale(self, t: Tensor) -> Tensor:
        """Return ``log a_t``."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """Return ``F(t)``, the derivative of ``log a``."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        r"""Return :math:`\sigma_t^2`, the variance given a start, accurate also near 0."""

    @abstractmethod
    def squared_diffusion(self, t: Tensor) -> Tensor:
        """Return ``g(t)^2``."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        r"""Return the time at which :math:`\log(a/\sigma)` has the given value."""

    @of_times
    def scale(self, t: Tensor) -> Tensor:
        """Return ``a_t``."""
        return self.log_scale(t).exp()

    @of_times
    def std(self, t: Tensor) -> Tensor:
        r"""Return :math:`\sigma_t`."""
        check_not_before(t, 0.0)
        return self.variance(t).sqrt()

    @of_times
    def log_snr(self, t: Tensor) -> Tensor:
        r"""Return :math:`\lambda_t=\log(a_t/\sigma_t)`."""
        return self.log_scale(t) - 0.5 * self.variance(t).log()

    def center(self, like: Tensor) -> Tensor:
        """Return the mean in the precision of ``like``; without axes it broadcasts to any dimension.

        Raises:
            ShapeError: If there is one mean for each of a number of items, and ``like`` has another number of points.
        """
        own = self.mean
        if own.ndim and (
            own.shape[-1] not in (1, like.shape[-1])
            or (own.ndim > 1 and like.shape[-2:-1] != own.shape[-2:-1])
        ):
            raise ShapeError(
                "the points don't fit the means of the process",
                got=f"points {tuple(like.shape)}, means {tuple(own.shape)}",
                hint="pass the means with the data, {'x1': ..., 'mean': ...}, and to sample(..., mean=...)",
            )
        return own.to(like.dtype)

    def location(self, t: Tensor, x0: Tensor) -> Tensor:
        """Return the mean of ``X_t`` given ``X_0 = x0 (..., d)``, with ``t`` broadcastable to ``x0[..., :1]``."""
        check_points(x0, "x0")
        center = self.center(x0)
        return center + self.scale(t) * (x0 - center)

    def perturb(self, t: Tensor, x0: Tensor, z: Tensor) -> Tensor:
        r"""Return :math:`X_t=\mu+a_t(x_0-\mu)+\sigma_tz`, with ``t`` broadcastable to ``x0[..., :1]``."""
        for name, value in (("t", t), ("x0", x0), ("z", z)):
            check_floating(value, name)
        check_time_broadcast(t, x0)
        if z.shape != x0.shape:
            raise ShapeError("x0 and z must have one shape", got=f"{tuple(x0.shape)} and {tuple(z.shape)}")
        return self.location(t, x0) + self.std(t) * z

    def denoised(self, t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        r"""Return the mean of the start given ``X_t = x`` by Tweedie's formula.

        .. math:: E[X_0\mid X_t=x]=\mu+\frac{x-\mu+\sigma_t^2\,s_t(x)}{a_t}
        """
        center = self.center(x)
        return center + (x - center + self.variance(t) * score) / self.scale(t)

    def kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Scale and variance of ``X_t`` given ``X_s`` for ``s <= t``.

        .. math:: X_t\mid X_s\sim N\big(\mu+\tfrac{a_t}{a_s}(X_s-\mu),\ \sigma_t^2-(a_t/a_s)^2\sigma_s^2\big)
        """
        ratio = (self.log_scale(t) - self.log_scale(s)).exp()
        return ratio, (self.variance(t) - ratio.square() * self.variance(s)).clamp(min=0)

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        """Return ``F(t) (x - mu)``."""
        return self.rate(t) * (x - self.center(x))

    def sde(self) -> SDE:
        """Return the forward equation."""
        return SDE(self.drift, self._coefficient)

    def _coefficient(self, t: Tensor, x: Tensor) -> Scalar:
        g = self.squared_diffusion(t).sqrt().to(x.dtype)
        return Scalar(g if g.ndim == 0 else g.squeeze(-1))

    def prior(self, like: Tensor) -> torch.distributions.Independent:
        """Return what sampling starts from, ``N(mu, sigma_T^2)``, shaped and typed like ``like (d,)``."""
        check_ndim(like, 1, "like", "(d,)")
        if not like.is_floating_point():
            raise InvalidInputError("like must be floating", got=like.dtype)
        std = self.std(torch.tensor(self.horizon, dtype=torch.float64)).to(like)
        normal = torch.distributions.Normal(
            self.center(like).expand_as(like), std.expand_as(like), validate_args=False
        )
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def grid(self, num_steps: int, spacing: str = "log-snr", dtype: torch.dtype = torch.float64) -> Tensor:
        """Times from ``horizon`` down to ``start``, ``(num_steps + 1,)``.

        Args:
            num_steps: The number of steps.
            spacing: How the times are spaced: ``"log-snr"`` (equal steps of the log signal-to-noise ratio), ``"uniform"``, or ``"quadratic"`` (finer
                towards the start).
            dtype: The precision of the times.
        """
        check_positive_int(num_steps, "num_steps")
        t = torch.tensor([self.horizon, self.start], dtype=torch.float64)
        unit = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        if spacing == "log-snr":
            first, last = self.log_snr(t)
            times = self.time_of_log_snr(first + (last - first) * unit)
        elif spacing == "uniform":
            times = t[0] + (t[1] - t[0]) * unit
        elif spacing == "quadratic":
            times = (t[0].sqrt() + (t[1].sqrt() - t[0].sqrt()) * unit).square()
        else:
            raise InvalidInputError(
                "spacing is unknown", got=repr(spacing), expected="'log-snr' | 'uniform' | 'quadratic'"
            )
        times[0], times[-1] = t[0], t[1]
        return times.to(dtype)

    def check_times(self, t: Tensor) -> None:
        """Raise TimeGridError unless ``0 <= t <= horizon``."""
        check_inside(t, torch.tensor([0.0, self.horizon], dtype=t.dtype), "t", "[0, horizon]")


class _Reverting(AffineProcess):
    r"""Reversion at a linear rate to a stationary law of constant spread.

    .. math:: \theta(t)=\theta_0+(\theta_1-\theta_0)t/T,\qquad g^2 = 2\theta s^2,\qquad \sigma^2=s^2(1-a^2)
    """

    def __init__(
        self,
        rate_first: float,
        rate_last: float,
        spread: float,
        horizon: float,
        start: float,
        mean: Tensor | float = 0.0,
    ) -> None:
        super().__init__(horizon, start, mean)
        check_real(rate_first, "rate_first", above=0.0)
        check_real(rate_last, "rate_last", above=0.0)
        check_real(spread, "spread", above=0.0)
        self.rate_first, self.rate_last, self.spread = float(rate_first), float(rate_last), float(spread)

    def _slope(self) -> float:
        return (self.rate_last - self.rate_first) / self.horizon

    @of_times
    def log_scale(self, t: Tensor) -> Tensor:
        """Return the logarithm of the factor that is left of the data."""
        return -(self.rate_first + 0.5 * self._slope() * t) * t

    @of_times
    def rate(self, t: Tensor) -> Tensor:
        """Return the rate of the linear drift, in 1/time."""
        return -(self.rate_first + self._slope() * t)

    @of_times
    def variance(self, t: Tensor) -> Tensor:
        """Return the variance of the noise that was added up to a time."""
        return -(self.spread**2) * torch.expm1(2 * self.log_scale(t))

    @of_times
    def squared_diffusion(self, t: Tensor) -> Tensor:
        """Return the squared strength of the noise."""
        return -2 * self.spread**2 * self.rate(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the log signal-to-noise ratio has a value."""
        # a^2 = s^2 snr / (1 + s^2 snr), so -2 log a = log(1 + 1 / (s^2 snr)), and the integral of the rate is half of it.
        travelled = 0.5 * torch.nn.functional.softplus(-2 * (log_snr + math.log(self.spread)))
        slope = self._slope()
        # Written so that neither a small slope nor a small time cancels.
        return 2 * travelled / (self.rate_first + (self.rate_first**2 + 2 * slope * travelled).sqrt())


class OU(_Reverting):
    r"""The Ornstein-Uhlenbeck process.

    .. math:: dX = -\theta X\,dt + g\,dW,\qquad a_t=e^{-\theta t},\qquad \sigma_t^2=\tfrac{g^2}{2\theta}(1-e^{-2\theta t})

    Args:
        rate: The rate :math:`\theta` at which the data are forgotten, in 1/time.
        diffusion: The strength g of the noise, in units of the data per root of time.
        horizon: The last time, at which nothing but noise is left; five over the rate if None.
        start: The first time that is learned, and at which sampling stops; positive. None takes a five-thousandth of the horizon.

    Raises:
        InvalidInputError: If a rate or the diffusion isn't positive, or times are out of order.

    Example:
        >>> OU().variance(torch.tensor(10.0))
        tensor(0.5000)
    """

    def __init__(
        self,
        rate: float = 1.0,
        diffusion: float = 1.0,
        horizon: float | None = None,
        start: float | None = None,
    ) -> None:
        check_real(rate, "rate", above=0.0)
        check_real(diffusion, "diffusion", above=0.0)
        horizon = 5.0 / rate if horizon is None else horizon
        check_real(horizon, "horizon", above=0.0)
        start = 2e-4 * horizon if start is None else start
        super().__init__(rate, rate, diffusion / math.sqrt(2 * rate), horizon, start)


class VP(_Reverting):
    r"""The variance-preserving process of denoising diffusion.

    .. math:: dX=-\tfrac12\beta(t)X\,dt+\sqrt{\beta(t)}\,dW,\qquad \beta(t)=\beta_0+(\beta_1-\beta_0)t,\qquad \sigma^2=1-a^2

    Args:
        beta_first: The rate :math:`\beta` of noising at time 0.
        beta_last: The rate :math:`\beta` of noising at time 1, the horizon.
        start: The first time that is learned, and at which sampling stops; positive.

    Raises:
        InvalidInputError: If a rate isn't positive, or the start lies outside (0, 1).

    Example:
        >>> VP().scale(torch.tensor(0.0))
        tensor(1.)

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, equation 11.
    """

    def __init__(self, beta_first: float = 0.1, beta_last: float = 20.0, start: float = 1e-3) -> None:
        check_real(beta_first, "beta_first", above=0.0)
        check_real(beta_last, "beta_last", above=0.0)
        super().__init__(beta_first / 2, beta_last / 2, 1.0, 1.0, start)


class MeanReverting(_Reverting):
    r"""Reversion to a given mean, such as a degraded observation that is to be restored.

    .. math:: dX=\theta(t)(\mu-X)\,dt+s\sqrt{2\theta(t)}\,dW,\qquad \sigma^2=s^2(1-a^2)

    Args:
        mean: The level :math:`\mu` that the process reverts to, a number or ``(d,)``; or ``(n, d)`` with one mean per item. In training
            every batch brings the means of its own items: ``{"x1": clean, "mean": degraded}``.
        spread: The standard deviation s of the stationary law about the mean.
        rate_first: The rate :math:`\theta` of reversion at time 0.
        rate_last: The rate :math:`\theta` of reversion at the horizon; it is linear in between.
        horizon: The last time, at which nothing but noise is left.
        start: The first time that is learned, and at which sampling stops; positive. None takes a thousandth of the horizon.

    Raises:
        InvalidInputError: If a rate or the spread isn't positive, or times are out of order.

    Example:
        >>> MeanReverting(torch.tensor([3.0, 4.0])).location(torch.tensor(1.0), torch.zeros(2))
        tensor([2.9808, 3.9744])

    Reference:
        Li et al., "MaRS: a fast sampler for mean reverting diffusion", 2025, equation 2.
    """

    def __init__(
        self,
        mean: Tensor | float,
        spread: float = 1.0,
        rate_first: float = 0.05,
        rate_last: float = 10.05,
        horizon: float = 1.0,
        start: float | None = None,
    ) -> None:
        check_real(horizon, "horizon", above=0.0)
        start = 1e-3 * horizon if start is None else start
        super().__init__(rate_first, rate_last, spread, horizon, start, mean)


class VE(AffineProcess):
    r"""The variance-exploding process: noise is added and nothing is scaled.

    .. math::
        \sigma_t^2=\sigma_{\min}^2\big((\sigma_{\max}/\sigma_{\min})^{2t}-1\big),\qquad
        g^2=2\log(\sigma_{\max}/\sigma_{\min})\,(\sigma_t^2+\sigma_{\min}^2)

    so that the variance is exactly zero at time 0.

    Args:
        sigma_min: The noise level from which the growth is geometric, in units of the data.
        sigma_max: The noise level at time 1, the horizon; several times the spread of the data.
        start: The first time that is learned, and at which sampling stops; positive.

    Raises:
        InvalidInputError: If not ``0 < sigma_min < sigma_max`` and ``0 < start < 1``.

    Example:
        >>> VE(0.01, 50.0).std(torch.tensor(1.0))
        tensor(50.0000)

    Reference:
        Song et al., "Score-based generative modeling through SDEs", 2021, equation 9.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, start: float = 1e-3) -> None:
        super().__init__(1.0, start)
        check_real(sigma_min, "sigma_min", above=0.0)
        check_real(sigma_max, "sigma_max", above=0.0)
        if not sigma_max > sigma_min:
            raise InvalidInputError(
                "sigma_max must exceed sigma_min", got=f"sigma_min={sigma_min}, sigma_max={sigma_max}"
            )
        self.sigma_min, self.log_growth = float(sigma_min), math.log(sigma_max / sigma_min)

    @of_times
    def log_scale(self, t: Tensor) -> Tensor:
        """Return the logarithm of the factor that is left of the data."""
        return torch.zeros_like(t)

    @of_times
    def rate(self, t: Tensor) -> Tensor:
        """Return the rate of the linear drift, in 1/time."""
        return torch.zeros_like(t)

    @of_times
    def variance(self, t: Tensor) -> Tensor:
        """Return the variance of the noise that was added up to a time."""
        return self.sigma_min**2 * torch.expm1(2 * self.log_growth * t)

    @of_times
    def squared_diffusion(self, t: Tensor) -> Tensor:
        """Return the squared strength of the noise."""
        return 2 * self.log_growth * self.sigma_min**2 * (2 * self.log_growth * t).exp()

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the log signal-to-noise ratio has a value."""
        return torch.log1p((-2 * log_snr).exp() / self.sigma_min**2) / (2 * self.log_growth)


def _as_mean(mean: object) -> Tensor:
    center = as_tensor(mean, "mean")
    check_ndim(center, (0, 1, 2), "mean", "a number, (d,) or (n, d)")
    return center


def check_process(process: object) -> AffineProcess:
    """Return ``process`` if it is an :class:`AffineProcess`, and raise InvalidInputError if not."""
    if not isinstance(process, AffineProcess):
        raise InvalidInputError(
            "process must be an AffineProcess",
            got=type(process).__name__,
            expected="OU() | VP() | VE() | ...",
        )
    return process
