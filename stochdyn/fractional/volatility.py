"""Simulated returns of an asset whose volatility is rough: plain, or the rough Bergomi model with leverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_hurst,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn.errors import InvalidInputError
from stochdyn.fractional._options import check_unused
from stochdyn.fractional.exact.fbm import sample_fbm

__all__ = ["RoughVolatility", "rough_volatility"]


class RoughVolatility(NamedTuple):
    """What :func:`rough_volatility` returns.

    Attributes:
        realised: The realised variances ``(*sample_shape, days)``, the sums of the squared returns of each day.
        integrated: The integrals over each day of the variance ``(*sample_shape, days)``, which they estimate.
        spot: The variance at the end of each day ``(*sample_shape, days)``.
        log_price: The logarithm of the price after each return ``(*sample_shape, days * M + 1)``, 0 at the start.
    """

    realised: Tensor
    integrated: Tensor
    spot: Tensor
    log_price: Tensor


def rough_volatility(
    days: int,
    hurst: float = 0.1,
    *,
    volatility_of_volatility: float = 0.6,
    mean_log_variance: float | None = None,
    forward_variance: float | Tensor | Callable[[Tensor], Tensor] | None = None,
    leverage: float = 0.0,
    returns_per_day: int = 78,
    sample_shape: int | Sequence[int] = (),
    generator: torch.Generator | int | None = None,
) -> RoughVolatility:
    r"""Simulate returns whose log variance is a fractional Brownian motion.

    Without a forward-variance curve the log variance is of type I around its mean,

    .. math::
        \log V_t=m+\nu B^H_t,\qquad r_j=\sqrt{V_{t_j}/M}\,\epsilon_j,\qquad \mathrm{RV}_d=\sum_{j\in d}r_j^2,

    with t in days and M returns per day: a series to infer from. With one it is the rough Bergomi model, for pricing,

    .. math::
        V_t=\xi_0(t)\,\exp\left(\nu\tilde B_t-\tfrac12\nu^2t^{2H}\right),\qquad
        \tilde B_t=\sqrt{2H}\int_0^t(t-s)^{H-1/2}dW_s,\qquad
        d\log S=-\tfrac12V\,dt+\sqrt V\left(\rho\,dW+\sqrt{1-\rho^2}\,dW^\perp\right),

    whose variance has the expectation :math:`\xi_0(t)` and whose price is a martingale. It is simulated by the hybrid scheme: the
    kernel is exact over the latest step, where it is singular, and a mean over each step before.
    The unit of time is a day, but nothing depends on that: with times in years, ``days=1`` is one year.

    Args:
        days: The length of the series.
        hurst: Hurst index H.
        volatility_of_volatility: The standard deviation :math:`\nu` of log variance after one day (in rough Bergomi,
            :math:`\eta`).
        mean_log_variance: The mean m of the log variance, by default -9.5; without ``forward_variance`` only.
        forward_variance: The curve :math:`\xi_0`: a number, a function of times in days, or its values at the starts of the
            ``days * returns_per_day`` steps.
        leverage: The correlation :math:`\rho` of price and volatility, from -1 to 1; with ``forward_variance`` only.
        returns_per_day: The number M of returns per day; 78 are the five-minute returns of a trading day.
        sample_shape: The shape of independent series, an int or a tuple.
        generator: The source of randomness, or its seed.

    Raises:
        HurstRangeError, InvalidInputError: For an index outside (0, 1), sizes or variances that aren't positive, a leverage outside
            [-1, 1], or options that have no effect.

    Example:
        >>> series = rough_volatility(100, generator=torch.Generator().manual_seed(0))
        >>> series.realised.shape, bool((series.realised > 0).all())
        (torch.Size([100]), True)
        >>> paths = rough_volatility(
        ...     1, 0.07, volatility_of_volatility=1.9, forward_variance=0.235**2, leverage=-0.9, sample_shape=1000, generator=0
        ... )  # one year, in 78 steps
        >>> bool(abs(paths.log_price[:, -1].exp().mean() - 1) < 0.05)
        True

    Reference:
        J. Gatheral, T. Jaisson and M. Rosenbaum, Volatility is rough, Quantitative Finance 18, 2018; C. Bayer, P. Friz and
        J. Gatheral, Pricing under rough volatility, Quantitative Finance 16, 2016; M. Bennedsen, A. Lunde and M. S. Pakkanen,
        Hybrid scheme for Brownian semistationary processes, Finance and Stochastics 21, 2017.
    """
    check_positive_int(days, "days")
    check_positive_int(returns_per_day, "returns_per_day")
    check_positive(volatility_of_volatility, "volatility_of_volatility")
    check_hurst(hurst)
    check_real(leverage, "leverage")
    if not -1 <= leverage <= 1:
        raise InvalidInputError("leverage must be a correlation", got=leverage, expected="from -1 to 1")
    shape = as_sample_shape(sample_shape)
    generator = as_generator(generator)
    steps, dt = days * returns_per_day, 1.0 / returns_per_day
    if forward_variance is None:
        check_unused({"leverage": leverage or None}, "no forward_variance")
        mean = -9.5 if mean_log_variance is None else mean_log_variance
        check_real(mean, "mean_log_variance")
        level = sample_fbm(hurst, steps, horizon=float(days), sample_shape=shape, generator=generator)
        variance = (mean + volatility_of_volatility * level[..., 1:].double()).exp()
        spot = variance
        normal = torch.randn(*shape, steps, generator=generator, dtype=torch.float64)
        returns = (variance * dt).sqrt() * normal
    else:
        check_unused({"mean_log_variance": mean_log_variance}, "forward_variance")
        curve = _curve(forward_variance, steps, dt)
        level, dw = _volterra(float(hurst), steps, dt, shape, generator)
        t = dt * torch.arange(steps + 1, dtype=torch.float64)
        # V = xi_0 exp(eta B - eta^2 t^(2H) / 2), whose expectation is xi_0.
        exponent = volatility_of_volatility * level - 0.5 * volatility_of_volatility**2 * t ** (2 * hurst)
        path = torch.cat([curve, curve[-1:]]) * exponent.exp()
        # the variance at the start of each step, which keeps the price a martingale
        variance, spot = path[..., :-1], path[..., 1:]
        own = torch.randn(*shape, steps, generator=generator, dtype=torch.float64) * math.sqrt(dt)
        driven = leverage * dw + math.sqrt(1 - leverage**2) * own
        returns = variance.sqrt() * driven - 0.5 * variance * dt
    log_price = torch.nn.functional.pad(returns.cumsum(-1), (1, 0))
    by_day = (days, returns_per_day)
    return RoughVolatility(
        returns.square().unflatten(-1, by_day).sum(-1),
        variance.unflatten(-1, by_day).mean(-1),
        spot.unflatten(-1, by_day)[..., -1].clone(),
        log_price,
    )


def _curve(given: float | Tensor | Callable[[Tensor], Tensor], steps: int, dt: float) -> Tensor:
    """Forward variances at the start of each step, ``(steps,)``."""
    t = dt * torch.arange(steps, dtype=torch.float64)
    value = as_tensor(
        given(t) if callable(given) else given, "forward_variance", (0, 1), "a number or (steps,)"
    ).double()
    if value.ndim == 1 and value.shape[0] != steps:
        raise InvalidInputError(
            "forward_variance must have a value per step", got=value.shape[0], expected=steps
        )
    check_positive(value, "forward_variance")
    return value.expand(steps)


def _volterra(
    hurst: float, steps: int, dt: float, shape: tuple[int, ...], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Unit type II noise ``(*shape, steps + 1)`` and the Brownian increments ``(*shape, steps)`` that drive it."""
    a = hurst - 0.5
    normal = torch.randn(2, *shape, steps, generator=generator, dtype=torch.float64)
    dw = normal[0] * math.sqrt(dt)
    # over the latest step the integral of (t - s)^a dW, exactly, given dW: mean dt^a dW / (a + 1)
    variance = dt ** (2 * a + 1) * (1 / (2 * a + 1) - 1 / (a + 1) ** 2)
    latest = dw * dt**a / (a + 1) + math.sqrt(max(variance, 0.0)) * normal[1]
    # over a step k before it, the mean of the kernel
    k = torch.arange(1, steps, dtype=torch.float64)
    kernel = dt**a * ((k + 1) ** (a + 1) - k ** (a + 1)) / (a + 1)
    # A causal convolution of the kernel with the increments, padded so that nothing wraps round.
    size = 2 * steps
    spectrum = torch.fft.rfft(torch.nn.functional.pad(kernel, (1, 0)), n=size) * torch.fft.rfft(dw, n=size)
    before = torch.fft.irfft(spectrum, n=size)[..., :steps]
    level = math.sqrt(2 * hurst) * (latest + before)
    return torch.nn.functional.pad(level, (1, 0)), dw
