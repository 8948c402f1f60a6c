"""Mixtures of bridges: the law of a coupling joined by Brownian or Ornstein-Uhlenbeck bridges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stochdyn._checks import check_event_size, check_finite, check_ndim, check_positive_int, check_same_dtype
from stochdyn.core.forward.flow import MarginalFlow, as_time
from stochdyn.core.gaussian.pinned import (
    PinnedProcess,
    bridge_coefficients,
    bridge_drift,
    check_bridge,
    safe_sqrt,
)
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

__all__ = ["BridgeMixture"]

_CHUNK = 2**22


class BridgeMixture(MarginalFlow):
    r"""The law :math:`\sum_i w_i\,P(\cdot\mid X_{t_0}=x_0^i,X_T=x_T^i)` of bridges of one reference process.

    Its marginals are mixtures of normals, and the Markov process with the same marginals that is nearest to
    it has the drift

    .. math:: b(t,x)=E[\,b^{bridge}(t,x;X_T)\mid X_t=x\,]

    (the Markovian projection), both in closed form by a softmax over the pairs. With the coupling of entropic
    transport, this is the Schrödinger bridge itself.

    Args:
        starts: :math:`x_0^i`, ``(n, d)``.
        ends: :math:`x_T^i`, ``(n, d)``.
        weights: ``(n,)`` nonnegative; they are normalised. Equal if None.
        rate: mean reversion of the reference, a number or ``(d,)``, in 1/time; zero for Brownian motion.
        mean: mean of the reference, likewise.
        scale: its diffusion, likewise, positive.
        start_time: :math:`t_0`.
        end_time: :math:`T`.

    Example:
        >>> flow = BridgeMixture(torch.zeros(2, 1), torch.tensor([[-1.0], [1.0]]))
        >>> flow.drift(0.0, torch.zeros(1, 1)), flow.drift(0.5, torch.tensor([[5.0]]))
        (tensor([[0.]]), tensor([[-8.]]))

    Reference: Peluchetti (2023), Diffusion bridge mixture transports, theorem 1; Shi et al. (2023), Diffusion
    Schrödinger bridge matching.
    """

    starts: Tensor
    ends: Tensor
    log_weights: Tensor
    rate: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        starts: Tensor,
        ends: Tensor,
        weights: Tensor | None = None,
        rate: Tensor | float = 0.0,
        mean: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        start_time: float = 0.0,
        end_time: float = 1.0,
    ) -> None:
        super().__init__()
        process = check_bridge(starts, ends, rate, mean, scale, start_time=start_time, end_time=end_time)
        check_ndim(starts, 2, "starts", "(n, d)")
        if starts.shape != ends.shape:
            raise ShapeError(
                "starts and ends must pair up", got=f"{tuple(starts.shape)}, {tuple(ends.shape)}"
            )
        if weights is None:
            weights = starts.new_ones(starts.shape[0])
        check_same_dtype(starts=starts, weights=weights)
        if weights.shape != starts.shape[:1]:
            raise ShapeError(
                "weights must fit the pairs", got=tuple(weights.shape), expected=(starts.shape[0],)
            )
        check_finite(weights.detach(), "weights")
        if bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise InvalidInputError(
                "weights must be nonnegative and not all zero", got=f"minimum {weights.min():g}"
            )
        dim = starts.shape[-1]
        for name, x in zip(("rate", "centre", "scale"), process, strict=True):
            if x.ndim > 1 or (x.ndim and x.shape[0] not in (1, dim)):
                raise ShapeError(f"{name} must be a number or ({dim},)", got=tuple(x.shape))
            self.register_buffer(name, x)
        self.register_buffer("starts", starts)
        self.register_buffer("ends", ends)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.start_time, self.end_time = float(start_time), float(end_time)

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        """See :meth:`MarginalFlow.log_prob`; strictly between the ends."""
        time, points, shape = self._points(t, x, open_start=True)
        return torch.cat([p.logsumexp(-1) for p in self._joint(time, points)]).reshape(shape[:-1])

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """See :meth:`MarginalFlow.score`; strictly between the ends."""
        time, points, shape = self._points(t, x, open_start=True)
        starts, ends = self._expected_ends(time, points)
        mean, variance = self._moments(time, starts, ends)
        return ((mean - points) / variance).reshape(shape)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` of the Markovian projection at ``x (..., d)``.

        Args:
            t: a number, or broadcastable to ``x[..., :1]``; from the start to before the end. At the start,
                bridges count by the start nearest to ``x``.
            x: points.
        """
        time, points, shape = self._points(t, x, open_start=False)
        _, ends = self._expected_ends(time, points)
        remaining = (self.end_time - time).to(points.dtype)
        return bridge_drift(self.rate, remaining, points - self.centre, ends - self.centre).reshape(shape)

    def expected_ends(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`E[X_{t_0}\mid X_t=x]` and :math:`E[X_T\mid X_t=x]`, both ``(..., d)``."""
        time, points, shape = self._points(t, x, open_start=False)
        starts, ends = self._expected_ends(time, points)
        return starts.reshape(shape), ends.reshape(shape)

    def sample(self, t: Tensor | float, n: int, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`MarginalFlow.sample`; ends included."""
        check_positive_int(n, "n")
        time = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        time = time.to(self.starts.device)
        if bool(((time < self.start_time) | (time > self.end_time)).any()):
            raise TimeGridError("t must lie inside the span of the bridges", got=time.tolist())
        index = self._pick(time.numel() * n, generator)
        clock = time.reshape(-1, 1).expand(-1, n).reshape(-1, 1)
        mean, variance = self._moments(clock, self.starts[index], self.ends[index])
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + safe_sqrt(variance) * noise).reshape(*time.shape, n, mean.shape[-1])

    def sample_paths(self, ts: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` paths ``(n, T, d)`` at ``ts (T,)``, of the mixture, not of its projection."""
        check_positive_int(n, "n")
        index = self._pick(n, generator)
        bridges = PinnedProcess(
            self.starts[index],
            self.ends[index],
            self.rate,
            self.centre,
            self.scale,
            start_time=self.start_time,
            end_time=self.end_time,
        )
        return bridges.sample(ts, 1, generator)[0]

    def _pick(self, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(
            self.log_weights.detach().exp(), count, replacement=True, generator=generator
        )

    def _points(self, t: Tensor | float, x: Tensor, open_start: bool) -> tuple[Tensor, Tensor, torch.Size]:
        """Flatten points to ``(P, d)`` with a time ``(P, 1)`` each."""
        check_event_size(x, self.starts.shape[-1], "x")
        check_same_dtype(x=x, starts=self.starts)
        time = as_time(t, x)
        early = time <= self.start_time if open_start else time < self.start_time
        if bool((early | (time >= self.end_time)).any()):
            left = "(" if open_start else "["
            raise TimeGridError(
                "t must lie between the ends of the bridges",
                got=f"t from {float(time.min()):g} to {float(time.max()):g}",
                expected=f"{left}{self.start_time:g}, {self.end_time:g})",
            )
        return time.expand(*x.shape[:-1], 1).reshape(-1, 1), x.reshape(-1, x.shape[-1]), x.shape

    def _moments(self, time: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(..., d)`` of bridges at ``time (..., 1)``."""
        dtype = self.starts.dtype
        elapsed, remaining = (time - self.start_time).to(dtype), (self.end_time - time).to(dtype)
        first, last, variance = bridge_coefficients(self.rate, elapsed, remaining)
        mean = self.centre + first * (starts - self.centre) + last * (ends - self.centre)
        return mean, (self.scale.square() * variance).expand(mean.shape)

    def _joint(self, time: Tensor, points: Tensor) -> Iterator[Tensor]:
        """Yield joint log densities ``(chunk, n)`` of pair and point, in chunks of bounded memory."""
        floor = torch.finfo(points.dtype).tiny ** 0.75
        size = max(1, _CHUNK // self.starts.numel())
        for clock, x in zip(time.split(size), points.split(size), strict=True):
            mean, variance = self._moments(clock[:, None], self.starts, self.ends)
            variance = variance.clamp_min(floor)  # at the start: the nearest start takes all
            squares = (x[:, None] - mean).square() / variance + variance.log()
            yield self.log_weights - 0.5 * (squares.sum(-1) + x.shape[-1] * math.log(2 * math.pi))

    def _expected_ends(self, time: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.cat((self.starts, self.ends), -1)
        means = torch.cat([logits.softmax(-1) @ pairs for logits in self._joint(time, points)])
        return means.tensor_split(2, -1)  # type: ignore[return-value]
