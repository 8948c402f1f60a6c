"""Brownian and Ornstein-Uhlenbeck processes pinned at both ends, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_inside,
    check_nonempty,
    check_positive,
    check_real,
    check_same_device,
    check_same_dtype,
    check_time_broadcast,
)
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.law import GaussianPathMeasure
from stochdyn.core.gaussian.recursion import affine_states, broadcast_batches
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

__all__ = ["PinnedProcess", "bridge_coefficients", "bridge_drift"]


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
        rate: The rate :math:`a`, in 1/time.
        elapsed: The time :math:`u\ge0` since the start.
        remaining: The time :math:`r\ge0` to the end.

    Example:
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> [round(float(c), 4) for c in bridge_coefficients(zero, one, 3 * one)]
        [0.75, 0.25, 0.75]
    """
    # sinh(a r) / sinh(a T) and sinh(a u) / sinh(a T) weigh the ends, variance sinh(a u) sinh(a r) / (a sinh(a T)), written with
    # exponentials that can't overflow and have the Brownian limit a -> 0.
    a, total = rate.abs(), elapsed + remaining
    whole = _saturation(a * total) * total
    before, after = _saturation(a * elapsed) * elapsed, _saturation(a * remaining) * remaining
    start = torch.exp(-a * elapsed) * after / whole
    end = torch.exp(-a * remaining) * before / whole
    return start, end, before * after / whole


def bridge_drift(rate: Tensor, remaining: Tensor, x: Tensor, end: Tensor) -> Tensor:
    r"""Return the drift :math:`a\,[x_T-x\cosh ar]/\sinh ar` of a bridge of an OU process around zero.

    Args:
        rate: The rate :math:`a`.
        remaining: The time :math:`r>0` to the end.
        x: The present value.
        end: The value to be reached.
    """
    # a (x_T - x cosh a r) / sinh a r, times exp(-a r) above and below.
    a = rate.abs()
    decay = torch.exp(-a * remaining)
    return (decay * end - 0.5 * (1 + decay.square()) * x) / (remaining * _saturation(a * remaining))


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero at zero, where the ends leave no variance."""
    return torch.where(x > 0, x, torch.ones_like(x)).sqrt() * (x > 0)


class PinnedProcess(GaussianPathMeasure):
    r"""A Brownian motion or Ornstein-Uhlenbeck process with both ends known.

    .. math:: dX=\theta(\mu-X)dt+\sigma dW\quad\text{given}\quad X_{t_0}=x_0,\ X_T=x_T;

    components are independent, and :math:`\theta=0` is Brownian motion. Use it for large states and many pairs of ends:
    nothing grows with the square of the state. A general linear equation is pinned by
    :meth:`LinearGaussianMeasure.conditioned` on observations of scale zero.

    Args:
        initial: The first point :math:`x_0`, ``(*B, d)``.
        final: The last point :math:`x_T`, ``(*B, d)``.
        rate: The rate :math:`\theta`, a number or broadcastable to ``(*B, d)``, in 1/time.
        mean: The mean :math:`\mu`, likewise, in units of the state.
        diffusion: The noise strength :math:`\sigma`, likewise, positive, in units of the state per root of time.
        start_time: The time :math:`t_0` of the start.
        end_time: The time :math:`T` of the end.

    Raises:
        ShapeError, DtypeMismatchError, NonFiniteError, InvalidInputError, TimeGridError: On arguments that
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
        initial: Tensor,
        final: Tensor,
        rate: Tensor | float = 0.0,
        mean: Tensor | float = 0.0,
        diffusion: Tensor | float = 1.0,
        *,
        start_time: float = 0.0,
        end_time: float = 1.0,
    ) -> None:
        super().__init__()
        named = check_bridge(initial, final, rate, mean, diffusion, start_time=start_time, end_time=end_time)
        shape = broadcast_batches({n: tuple(x.shape) for n, x in named.items()})
        for name, x in named.items():
            if isinstance(x, nn.Parameter):
                self.register_parameter(f"_{name}", x)
            else:
                self.register_buffer(f"_{name}", x if x.requires_grad else x.detach().clone())
        self.start_time, self.end_time = float(start_time), float(end_time)
        self.batch_shape, self.dim = shape[:-1], shape[-1]

    @property
    def initial(self) -> Tensor:
        """The start, ``(*B, d)``."""
        return self._expand("initial")

    @property
    def final(self) -> Tensor:
        """The end, ``(*B, d)``."""
        return self._expand("final")

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the law."""
        return self.get_parameter_or_buffer("initial")

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """Return what was given as ``name``."""
        value = getattr(self, f"_{name}")
        assert isinstance(value, Tensor)
        return value

    def _expand(self, name: str) -> Tensor:
        return self.get_parameter_or_buffer(name).expand(*self.batch_shape, self.dim)

    def _lift(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, mean and diffusion with an axis for time before the last."""
        rate, centre, scale = (self._expand(n)[..., None, :] for n in ("rate", "mean", "diffusion"))
        return rate, centre, scale

    def _clock(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Time since the start and to the end, ``(T, 1)``, subtracted in the precision of the grid."""
        check_inside(ts.detach(), ts.new_tensor([self.start_time, self.end_time]), "ts", "the bridge")
        dtype = self.like.dtype
        elapsed, remaining = (ts - self.start_time).clamp_min(0), (self.end_time - ts).clamp_min(0)
        # Times that differ from the ends by their rounding are the ends.
        near = 8 * torch.finfo(ts.dtype).eps * ts.detach().abs()
        elapsed, remaining = (torch.where(x.detach() <= near, 0 * x, x) for x in (elapsed, remaining))
        return elapsed.to(dtype)[:, None], remaining.to(dtype)[:, None]

    def _steps(self, ts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decay, pull of the end and variance ``(*B, T, d)`` of the step to every time from the one before."""
        rate, _, scale = self._lift()
        elapsed, remaining = self._clock(ts)
        steps = torch.cat((elapsed[:1], (ts[1:] - ts[:-1]).to(elapsed.dtype)[:, None]))
        decay, last, variance = bridge_coefficients(rate, steps, remaining)
        return decay, last, scale.square() * variance

    def mean(self, ts: Tensor) -> Tensor:
        """Return the means ``(*B, T, d)`` at times ``ts (T,)`` of the span, ends included."""
        ts = self._grid(ts)
        rate, centre, _ = self._lift()
        first, last, _ = bridge_coefficients(rate, *self._clock(ts))
        return (
            centre
            + first * (self.initial[..., None, :] - centre)
            + last * (self.final[..., None, :] - centre)
        )

    def variance(self, ts: Tensor) -> Tensor:
        """Return the marginal variances ``(*B, T, d)`` at times ``ts (T,)``."""
        ts = self._grid(ts)
        rate, _, scale = self._lift()
        return scale.square() * bridge_coefficients(rate, *self._clock(ts))[2]

    def covariance(self, ts: Tensor) -> Tensor:
        """Return the marginal covariances ``(*B, T, d, d)`` at times ``ts (T,)``, which are diagonal."""
        return torch.diag_embed(self.variance(ts))

    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the chain of the law at times ``ts (T,)``."""
        decay, last, variance = (x.movedim(-2, 0) for x in self._steps(ts))
        _, centre, _ = self._lift()
        centre = centre[..., 0, :]
        # X_n - mu = decay (X_{n-1} - mu) + last (x_T - mu) + noise
        shift = (1 - decay - last) * centre + last * self.final
        return GaussianChain(
            decay[0] * self.initial + shift[0],
            torch.diag_embed(variance[0]),
            torch.diag_embed(decay[1:]),
            shift[1:],
            torch.diag_embed(variance[1:]),
        )

    def certain(self, chain: GaussianChain, ts: Tensor) -> Tensor:
        """Return ``(T,)``, True at the pinned ends."""
        elapsed, remaining = self._clock(ts)
        return ((elapsed <= 0) | (remaining <= 0)).flatten()

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths ``(*sample, *B, T, d)`` at times ``ts (T,)``; see :meth:`PathMeasure.sample`."""
        ts, shape = self._grid(ts), as_sample_shape(sample_shape)
        source = as_generator(generator, self.like.device)
        mean = self.mean(ts)
        decay, _, variance = self._steps(ts)
        noise = torch.randn(*shape, *mean.shape, dtype=mean.dtype, device=mean.device, generator=source)
        # Components are independent: as many scalar recursions, one column per draw.
        increments = (safe_sqrt(variance) * noise).reshape(-1, *mean.shape).movedim(-2, 0).movedim(1, -1)
        gap = affine_states(
            decay.movedim(-2, 0)[1:, ..., None, None],
            increments[1:].unsqueeze(-2),
            increments[0].unsqueeze(-2),
        )
        gap = gap.squeeze(-2).movedim(-1, 0).movedim(1, -2)
        return PathSample.of_states(ts, mean + gap.reshape(*shape, *mean.shape), self)

    def transition(self, t: Tensor | float, x: Tensor, stop: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``(..., d)`` of the bridge at ``stop``, given ``x (..., *B, d)`` at ``t``.

        Args:
            t: A number, or broadcastable to ``x[..., :1]``; before the end.
            x: The present values.
            stop: The end of the interval, likewise; from ``t`` to the end.
        """
        t, stop = _as_time(t, x), _as_time(stop, x)
        if bool(((t < self.start_time) | (t >= self.end_time) | (stop < t) | (stop > self.end_time)).any()):
            raise TimeGridError(
                "t and stop don't fit the bridge",
                got=f"{t.tolist()}, {stop.tolist()}",
                expected=f"{self.start_time:g} <= t <= stop <= {self.end_time:g}, t before the end",
            )
        elapsed, remaining = (stop - t).to(x.dtype), (self.end_time - stop).to(x.dtype)
        rate, centre, scale = (self._expand(n) for n in ("rate", "mean", "diffusion"))
        first, last, variance = bridge_coefficients(rate, elapsed, remaining)
        mean = centre + first * (x - centre) + last * (self.final - centre)
        return mean, (scale.square() * variance).expand(mean.shape)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift ``(..., d)`` of the bridge's own equation, whose diffusion is :math:`\sigma`.

        Args:
            t: A number, or broadcastable to ``x[..., :1]``; before the end.
            x: The points ``(..., *B, d)``.

        Raises:
            TimeGridError: At or after the end, where the drift is singular.
        """
        t = _as_time(t, x)
        if bool((t >= self.end_time).any()):
            raise TimeGridError(
                "the drift of a bridge is singular at its end", got=f"t up to {t.max().item():g}"
            )
        remaining = (self.end_time - t).to(x.dtype)
        rate, centre = self._expand("rate"), self._expand("mean")
        return bridge_drift(rate, remaining, x - centre, self.final - centre)

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` of a diffusion at times ``t (n,)``."""
        rate = torch.diag_embed(self._expand("diffusion").square())
        return rate.expand(t.shape[0], *rate.shape)

    def to_sde(self) -> SDE:
        """Return the bridge's equation, to be simulated on grids that stop before the end."""
        return SDE(self.drift, Diagonal(self._expand("diffusion")))

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the bridge as a :class:`~stochdyn.DiffusionMeasure`, for grids that end before it does."""
        return DiffusionMeasure(self.initial, self.to_sde(), start_time=self.start_time)


def check_bridge(
    initial: object,
    final: object,
    rate: object,
    mean: object,
    diffusion: object,
    *,
    start_time: float,
    end_time: float,
) -> dict[str, Tensor]:
    """Check the arguments of a bridge; returns them by name as tensors like ``initial``."""
    initial = as_tensor(initial, "initial")
    final = as_tensor(final, "final", like=initial)
    for name, x in (("initial", initial), ("final", final)):
        if x.ndim < 1:
            raise ShapeError(f"{name} must be (*B, d)", got=tuple(x.shape))
        check_nonempty(x, name)
    if initial.shape[-1] != final.shape[-1]:
        raise ShapeError(
            "initial and final must have the same size", got=f"{tuple(initial.shape)}, {tuple(final.shape)}"
        )
    check_real(start_time, "start_time", fixed=True)
    check_real(end_time, "end_time", fixed=True)
    if end_time <= start_time:
        raise TimeGridError("end_time must be after start_time", got=f"{start_time}, {end_time}")
    given = {
        name: as_tensor(x, name, like=initial)
        for name, x in (("rate", rate), ("mean", mean), ("diffusion", diffusion))
    }
    check_positive(given["diffusion"].detach(), "diffusion")
    named = {"initial": initial, "final": final, **given}
    check_same_dtype(**named)
    check_same_device(**named)
    return named


def _as_time(t: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidInputError("x must be a floating tensor", got=type(x).__name__)
    if isinstance(t, Tensor):
        check_time_broadcast(t, x)
        return t
    check_real(t, "t")
    return torch.tensor(float(t), dtype=torch.float64).to(x.device)
