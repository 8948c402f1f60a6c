"""Driving noise: how increments are drawn, and how memory states are carried from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochdyn._checks import check_bool

__all__ = ["Brownian", "NoiseProcess", "NoiseSteps"]


@dataclass(frozen=True)
class NoiseSteps:
    r"""The linear recursion of a noise process on one time grid, for all steps at once.

    Step :math:`n` draws, per noise channel, ``R`` independent Gaussian innovations
    :math:`\epsilon_n\sim N(0,\mathrm{diag}(\mathtt{variance}_n))`. The first is the Brownian increment
    :math:`\Delta W_n` of variance :math:`\Delta_n`; the others are what an exact step of the memory states
    needs beyond it. Then, with memory states :math:`Y\in\mathbb R^K` per channel,

    .. math::
        \Delta Z_n = Y_n\cdot\mathtt{recall}_n + \epsilon_n\cdot\mathtt{gain}_n,\qquad
        Y_{n+1} = \mathtt{decay}_n\odot Y_n + \mathtt{load}_n^\top\epsilon_n .

    Attributes:
        variance: The variances ``(N, R)`` of the innovations; ``variance[:, 0]`` are the step sizes.
        gain: The gain ``(N, *hurst_batch, R)``; recall: ``(N, *hurst_batch, K)``; decay: ``(N, K)``; load:
            ``(N, R, K)``. ``hurst_batch`` is empty unless the process carries a batch of parameters; it then aligns
            with the batch axes of the state.
        per_channel: Whether gain and recall have an axis of channels too, ``(N, *hurst_batch, m, R)`` and
            ``(N, *hurst_batch, m, K)``: channels with parameters of their own.
        per_series: Whether every series has a grid of its own: all coefficients then have its batch axes after the first one,
            decay as ``(N, *batch, 1, K)`` and load as ``(N, *batch, R, K)``.
    """

    variance: Tensor
    gain: Tensor
    recall: Tensor
    decay: Tensor
    load: Tensor
    per_channel: bool = False
    per_series: bool = False

    @property
    def parameter_batch(self) -> torch.Size:
        """Batch shape of the parameters behind the coefficients, without that of the channels."""
        return self.gain.shape[1 : -2 if self.per_channel else -1]

    def to(self, dtype: torch.dtype) -> NoiseSteps:
        """Return the same coefficients in another precision."""
        parts = (self.variance, self.gain, self.recall, self.decay, self.load)
        variance, gain, recall, decay, load = (p.to(dtype) for p in parts)
        return NoiseSteps(variance, gain, recall, decay, load, self.per_channel, self.per_series)


class NoiseProcess(nn.Module, ABC):
    r"""A process :math:`Z` that drives :math:`dX=b\,dt+\sigma\,dZ`, itself driven by one Brownian motion a channel.

    Channels are independent copies. All randomness of a path on ``N`` steps is an array of *increments* of
    shape ``(N, *batch, m * R)``: the first ``m`` columns are the Brownian increments of the ``m`` channels,
    the remaining ``m * (R - 1)`` columns, channel-major, are the further innovations of exact memory steps.

    Attributes:
        num_states: The number ``K`` of memory states per channel; 0 for Brownian motion.
    """

    num_states: int = 0

    @abstractmethod
    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """Return the coefficients of every step of the grid ``ts (T,)``, differentiable in the parameters."""

    @abstractmethod
    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return ``F (Q, K)`` with initial states ``Y_0 = z F``, ``z ~ N(0, I_Q)``; None if they start at 0."""

    def num_innovations(self, ts: Tensor) -> int:
        """Return ``R``, the number of independent innovations per channel and step on this grid."""
        return 1


class Brownian(NoiseProcess):
    r"""Standard Brownian motion: no memory, one innovation per step, or two with areas.

    Use it unless increments remember each other; :class:`~stochdyn.fractional.MarkovNoise` is for those that do.

    Args:
        areas: Whether a step also draws the area between the path and its chord, :math:`H_n=\frac1{\Delta_n}\int(W_s-W_{t_n})ds-
            \tfrac12\Delta W_n\sim N(0,\Delta_n/12)`, which :class:`~stochdyn.core.SRA` needs. Other methods leave it alone.

    Example:
        >>> Brownian(areas=True).steps(torch.tensor([0.0, 1.0, 3.0]), dtype=torch.float64).variance
        tensor([[1.0000, 0.0833],
                [2.0000, 0.1667]], dtype=torch.float64)
    """

    num_states = 0

    def __init__(self, areas: bool = False) -> None:
        super().__init__()
        check_bool(areas, "areas")
        self.areas = areas

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """Return the coefficients of every step of the grid ``ts (T,)``, differentiable in the parameters."""
        dt = (ts[1:] - ts[:-1]).to(dtype)
        n = dt.shape[0]
        variance, gain = self.innovations(dt)
        empty = dt.new_zeros(n, 0)
        return NoiseSteps(variance, gain, empty, empty, dt.new_zeros(n, variance.shape[-1], 0))

    def innovations(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Return variances and gains ``(..., R)`` of the innovations of steps ``dt (...)``."""
        dt = dt.unsqueeze(-1)
        if not self.areas:
            return dt, torch.ones_like(dt)
        return torch.cat([dt, dt / 12], -1), torch.cat([torch.ones_like(dt), torch.zeros_like(dt)], -1)

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Brownian motion has no memory: None."""
        return None

    def num_innovations(self, ts: Tensor) -> int:
        """Return ``R``, the number of independent innovations per channel and step on this grid."""
        return 2 if self.areas else 1
