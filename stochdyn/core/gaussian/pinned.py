"""Brownian and Ornstein-Uhlenbeck bridges in closed form, and mixtures of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import (
    check_finite,
    check_inside,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_same_device,
    check_same_dtype,
    check_time_broadcast,
    check_time_grid,
)
from stochdyn.core.gaussian._batching import broadcast_batches
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

if TYPE_CHECKING:
    from stochdyn.core.sde.equation import SDE

__all__ = ["PinnedProcess", "bridge_coefficients", "bridge_drift", "linear_scan"]


def _saturation(x: Tensor) -> Tensor:
    """Return ``(1 - exp(-2x)) / (2x)`` for ``x >= 0``, one at zero, with derivatives there."""
    small = x.abs() < 1e-5
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x + (2 / 3) * x.square(), -torch.expm1(-2 * safe) / (2 * safe))


def bridge_coefficients(rate: Tensor, elapsed: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the weights of both ends and the variance of a bridge of an OU process around zero.

    .. math::
        c_0=\frac{\sinh ar}{\sinh a(u+r)},\quad c_1=\frac{\sinh au}{\sinh a(u+r)},\quad
        v=\frac{\sinh au\,\sinh ar}{a\sinh a(u+r)}

    in a form that neither overflows for :math:`a(u+r)\gg1` nor loses digits for :math:`a\to0`, where it is
    linear interpolation. The diffusion is one, and the bridge depends on :math:`|a|` only.

    Args:
        rate: :math:`a`, in 1/time.
        elapsed: :math:`u\ge0`, time since the start.
        remaining: :math:`r\ge0`, time to the end.

    Example:
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> [round(float(c), 4) for c in bridge_coefficients(zero, one, 3 * one)]
        [0.75, 0.25, 0.75]
    """
    a, total = rate.abs(), elapsed + remaining
    whole = _saturation(a * total) * total
    before, after = _saturation(a * elapsed) * elapsed, _saturation(a * remaining) * remaining
    start = torch.exp(-a * elapsed) * after / whole
    end = torch.exp(-a * remaining) * before / whole
    return start, end, before * after / whole


def bridge_drift(rate: Tensor, remaining: Tensor, x: Tensor, end: Tensor) -> Tensor:
    r"""Return the drift :math:`a\,[x_T-x\cosh ar]/\sinh ar` of a bridge of an OU process around zero.

    Args:
        rate: :math:`a`.
        remaining: :math:`r>0`, time to the end.
        x: present value.
        end: value to be reached.
    """
    a = rate.abs()
    decay = torch.exp(-a * remaining)
    return (decay * end - 0.5 * (1 + decay.square()) * x) / (remaining * _saturation(a * remaining))


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero at zero, where the ends leave no variance."""
    return torch.where(x > 0, x, torch.ones_like(x)).sqrt() * (x > 0)


def linear_scan(decay: Tensor, increments: Tensor) -> Tensor:
    r"""Solve :math:`z_n=\mathtt{decay}_n z_{n-1}+\mathtt{increments}_n` from zero, all times at once.

    Args:
        decay: ``(..., T, d)``.
        increments: ``(..., T, d)``, with batch axes that broadcast.

    Example:
        >>> linear_scan(torch.full((3, 1), 0.5), torch.ones(3, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])

    Reference: Hillis & Steele (1986), Data parallel algorithms.
    """
    steps, offset = increments.shape[-2], 1
    while offset < steps:
        early, late = increments[..., :offset, :], increments[..., offset:, :]
        late = late + decay[..., offset:, :] * increments[..., :-offset, :]
        increments = torch.cat((early, late), -2)
        decay = torch.cat((decay[..., :offset, :], decay[..., offset:, :] * decay[..., :-offset, :]), -2)
        offset *= 2
    return increments


class PinnedProcess:
    r"""A Brownian motion or Ornstein-Uhlenbeck process with both ends known.

    .. math:: dX=\theta(\mu-X)dt+\sigma dW\quad\text{given}\quad X_{t_0}=x_0,\ X_T=x_T;

    components are independent, and :math:`\theta=0` is Brownian motion. A general linear equation is pinned
    by :meth:`LinearGaussianMeasure.posterior` with observations of scale zero.

    Args:
        start: :math:`x_0`, ``(*B, d)``.
        end: :math:`x_T`, ``(*B, d)``.
        rate: :math:`\theta`, a number or broadcastable to ``(*B, d)``, in 1/time.
        mean: :math:`\mu`, likewise.
        scale: :math:`\sigma`, likewise, positive.
        start_time: :math:`t_0`.
        end_time: :math:`T`.

    Raises:
        ShapeError, DtypeMismatchError, NonFiniteError, InvalidInputError, TimeGridError: on arguments that
            don't fit.

    Example:
        >>> bridge = PinnedProcess(torch.zeros(1), torch.ones(1))
        >>> ts = torch.tensor([0.25, 0.5])
        >>> bridge.mean(ts).flatten(), bridge.variance(ts).flatten()
        (tensor([0.2500, 0.5000]), tensor([0.1875, 0.2500]))

    Reference: Corlay (2013), Properties of the Ornstein-Uhlenbeck bridge.
    """

    def __init__(
        self,
        start: Tensor,
        end: Tensor,
        rate: Tensor | float = 0.0,
        mean: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        start_time: float = 0.0,
        end_time: float = 1.0,
    ) -> None:
        self.rate, self.centre, self.scale = check_bridge(
            start, end, rate, mean, scale, start_time=start_time, end_time=end_time
        )
        shapes = {"start": start, "end": end, "rate": self.rate, "mean": self.centre, "scale": self.scale}
        shape = broadcast_batches({n: tuple(x.shape) for n, x in shapes.items()})
        self.start, self.end = start.expand(shape), end.expand(shape)
        self.start_time, self.end_time = float(start_time), float(end_time)
        self.batch_shape, self.dim = shape[:-1], shape[-1]

    def _lift(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, mean and scale with an axis for time before the last."""
        shape = self.start.shape
        rate, centre, scale = (x.expand(shape)[..., None, :] for x in (self.rate, self.centre, self.scale))
        return rate, centre, scale

    def _clock(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Time since the start and to the end, ``(T, 1)``, subtracted in the precision of the grid."""
        check_time_grid(ts, min_points=1)
        check_same_device(ts=ts, start=self.start)
        check_inside(ts.detach(), ts.new_tensor([self.start_time, self.end_time]), "ts", "the bridge")
        dtype = self.start.dtype
        elapsed, remaining = (ts - self.start_time).clamp_min(0), (self.end_time - ts).clamp_min(0)
        return elapsed.to(dtype)[:, None], remaining.to(dtype)[:, None]

    def mean(self, ts: Tensor) -> Tensor:
        """Return the means ``(*B, T, d)`` at times ``ts (T,)`` of the span, ends included."""
        rate, centre, _ = self._lift()
        first, last, _ = bridge_coefficients(rate, *self._clock(ts))
        return centre + first * (self.start[..., None, :] - centre) + last * (self.end[..., None, :] - centre)

    def variance(self, ts: Tensor) -> Tensor:
        """Return the marginal variances ``(*B, T, d)`` at times ``ts (T,)``."""
        rate, _, scale = self._lift()
        return scale.square() * bridge_coefficients(rate, *self._clock(ts))[2]

    def transition(self, t: Tensor | float, x: Tensor, stop: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``(..., d)`` of the bridge at ``stop``, given ``x (..., *B, d)`` at ``t``.

        Args:
            t: a number, or broadcastable to ``x[..., :1]``; before the end.
            x: present values.
            stop: likewise; from ``t`` to the end.
        """
        t, stop = _as_time(t, x), _as_time(stop, x)
        if bool(((t < self.start_time) | (t >= self.end_time) | (stop < t) | (stop > self.end_time)).any()):
            raise TimeGridError(
                "t and stop don't fit the bridge",
                got=f"{t.tolist()}, {stop.tolist()}",
                expected=f"{self.start_time:g} <= t <= stop <= {self.end_time:g}, t before the end",
            )
        elapsed, remaining = (stop - t).to(x.dtype), (self.end_time - stop).to(x.dtype)
        first, last, variance = bridge_coefficients(self.rate, elapsed, remaining)
        mean = self.centre + first * (x - self.centre) + last * (self.end - self.centre)
        return mean, (self.scale.square() * variance).expand(mean.shape)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift ``(..., d)`` of the bridge's own equation, whose diffusion is :math:`\sigma`.

        Args:
            t: a number, or broadcastable to ``x[..., :1]``; before the end.
            x: ``(..., *B, d)``.

        Raises:
            TimeGridError: at or after the end, where the drift is singular.
        """
        t = _as_time(t, x)
        if bool((t >= self.end_time).any()):
            raise TimeGridError(
                "the drift of a bridge is singular at its end", got=f"t up to {t.max().item():g}"
            )
        remaining = (self.end_time - t).to(x.dtype)
        return bridge_drift(self.rate, remaining, x - self.centre, self.end - self.centre)

    def to_sde(self) -> SDE:
        """Return the bridge's equation, to be simulated on grids that stop before the end."""
        from stochdyn.core.sde.coefficients import Diagonal
        from stochdyn.core.sde.equation import SDE

        return SDE(self.drift, Diagonal(self.scale.expand(self.start.shape)))

    def sample(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` exact paths, ``(n, *B, T, d)``, at times ``ts (T,)``; all times at once."""
        check_positive_int(n, "n")
        rate, _, scale = self._lift()
        mean = self.mean(ts)
        elapsed, remaining = self._clock(ts)
        steps = torch.cat((elapsed[:1], (ts[1:] - ts[:-1]).to(elapsed.dtype)[:, None]))
        decay, _, variance = bridge_coefficients(rate, steps, remaining)
        noise = torch.randn(n, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + linear_scan(decay, scale * safe_sqrt(variance) * noise)

    def log_prob(self, ts: Tensor, x: Tensor) -> Tensor:
        """Return the log density of values ``x (*sample, *B, T, d)`` at times ``ts (T,)``.

        The pinned ends, where the grid holds them, are not part of the event.
        """
        check_same_dtype(x=x, start=self.start)
        elapsed, remaining = self._clock(ts)
        if x.ndim < 2 or x.shape[-2:] != (ts.shape[0], self.dim):
            expected = f"(*sample, *B, {ts.shape[0]}, {self.dim})"
            raise ShapeError("x has the wrong shape", got=tuple(x.shape), expected=expected)
        check_finite(x.detach(), "x")
        inside = ((elapsed > 0) & (remaining > 0)).flatten()
        x, elapsed, remaining = x[..., inside, :], elapsed[inside], remaining[inside]
        rate, centre, scale = self._lift()
        start = self.start[..., None, :]
        before = torch.cat((start.expand(*x.shape[:-2], 1, self.dim), x), -2)[..., :-1, :]
        steps = torch.cat((elapsed[:1], elapsed[1:] - elapsed[:-1]))
        first, last, variance = bridge_coefficients(rate, steps, remaining)
        mean = centre + first * (before - centre) + last * (self.end[..., None, :] - centre)
        variance = scale.square() * variance
        terms = (x - mean).square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * terms.sum((-2, -1))


def check_bridge(
    start: Tensor,
    end: Tensor,
    rate: Tensor | float,
    mean: Tensor | float,
    scale: Tensor | float,
    *,
    start_time: float,
    end_time: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of a bridge; return rate, mean and scale as tensors like ``start``."""
    for name, x in (("start", start), ("end", end)):
        if not isinstance(x, Tensor) or x.ndim < 1 or not x.is_floating_point():
            raise ShapeError(f"{name} must be a floating tensor (*B, d)", got=type(x).__name__)
        check_nonempty(x, name)
        check_finite(x.detach(), name)
    given = {n: x for n, x in (("rate", rate), ("mean", mean), ("scale", scale)) if isinstance(x, Tensor)}
    check_same_dtype(start=start, end=end, **given)
    check_same_device(start=start, end=end, **given)
    if start.shape[-1] != end.shape[-1]:
        raise ShapeError(
            "start and end must have the same size", got=f"{tuple(start.shape)}, {tuple(end.shape)}"
        )
    if not math.isfinite(start_time) or not math.isfinite(end_time) or end_time <= start_time:
        raise TimeGridError("end_time must be after start_time", got=f"{start_time}, {end_time}")
    check_positive(scale.detach() if isinstance(scale, Tensor) else scale, "scale")
    parts = [torch.as_tensor(x, dtype=start.dtype, device=start.device) for x in (rate, mean, scale)]
    for name, x in zip(("rate", "mean"), parts, strict=False):
        check_finite(x.detach(), name)
    return parts[0], parts[1], parts[2]


def _as_time(t: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidInputError("x must be a floating tensor", got=type(x).__name__)
    if isinstance(t, Tensor):
        check_time_broadcast(t, x)
        return t
    return torch.tensor(float(t), dtype=torch.float64).to(x.device)
