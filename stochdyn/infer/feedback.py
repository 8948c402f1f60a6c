"""Posterior laws of a path's increments: Gaussian given the state, with a mean that answers to the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.sde.equation import Control

__all__ = ["Feedback", "Gains"]


@dataclass(frozen=True)
class Gains:
    r"""Coefficients of a feedback law at every step, in units of the increments' prior standard deviation.

    The standardised increment :math:`\epsilon_n=e_n/\sqrt{\mathrm{variance}_n}` of step :math:`n` is

    .. math:: \epsilon_n\mid z_n\sim N\big(k_n + K_n\,(z_n-c_n)/w,\ L_nL_n^\top\big).

    Attributes:
        offset: ``k (N, *batch, M)``.
        gain: ``K (N, *batch, M, Z)``.
        factor: ``L (N, *batch, M, M)``, lower triangular with positive diagonal.
        centre: ``c (N, *batch, Z)``.
        width: ``w (*batch, Z)``.
    """

    offset: Tensor
    gain: Tensor
    factor: Tensor
    centre: Tensor
    width: Tensor


class Feedback(Control):
    """A control of all increments of a step, as the posterior of a path needs it.

    Besides the linear feedback of :class:`Gains` it takes an optional network ``(t, (z - c) / w, context)
    -> (..., M)`` that is added to the mean. The covariance of a step is a free triangular factor, so the
    law on the grid can match the exact posterior of a linear-Gaussian model at any step size.

    Args:
        gains: the linear part.
        scale: ``(N, M)`` prior standard deviations of the increments.
        network: the nonlinear part, or None.
        context: ``(N, *batch, C)`` what the network is told at each step, or None.
        own: the control of the equation itself, which acts on the increments after the feedback.
    """

    def __init__(
        self,
        gains: Gains,
        scale: Tensor,
        network: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
        context: Tensor | None = None,
        own: Control | None = None,
    ) -> None:
        super().__init__()
        self.own = own
        self.gains = gains
        self.scale = scale
        self.network = network
        self.context = context
        # Rows by step, so that the time loop indexes nothing.
        self._rows = [
            r.unbind(0) for r in (gains.offset, gains.gain.mT.contiguous(), gains.factor, gains.centre, scale)
        ]

    def shape_increment(self, n: int, t: Tensor, dt: float, z: Tensor, e: Tensor, channels: int) -> Tensor:
        """See :meth:`stochdyn.core.sde.equation.Control.shape_increment`."""
        offset, gain, factor, centre, scale = (rows[n] for rows in self._rows)
        deviation = (z - centre) / self.gains.width
        mean = offset + _rows_times(deviation, gain)
        if self.network is not None:
            mean = mean + self.network(t, deviation, None if self.context is None else self.context[n])
        standard = e / scale
        shaped = (mean + _spread(factor, standard)) * scale
        return shaped if self.own is None else self.own.shape_increment(n, t, dt, z, shaped, channels)

    def affine(self, e: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :meth:`stochdyn.core.sde.equation.Control.affine`."""
        if self.network is not None or self.own is not None:
            return None
        g = self.gains
        ndim, scale = e.ndim, _lead(self.scale, e.ndim)
        gain = g.gain / g.width.unsqueeze(-2)
        offset = g.offset - (gain @ g.centre.unsqueeze(-1)).squeeze(-1)
        noise = _times(_lead(g.factor, ndim + 1), e / scale)
        return (_lead(offset, ndim) + noise) * scale, _lead(gain.mT, ndim + 1) * scale.unsqueeze(-2)

    def before(self, own: Control | None) -> Feedback:
        """Return the same feedback, followed by the control of the equation itself."""
        return Feedback(self.gains, self.scale, self.network, self.context, own)

    def mean(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the conditional means of all steps, ``(N, *sample, *batch, M)``, given ``z`` before each."""
        g = self.gains
        deviation = (z - _lead(g.centre, z.ndim)) / g.width
        mean = _lead(g.offset, z.ndim) + _rows_times(deviation, _lead(g.gain.mT, z.ndim + 1))
        if self.network is not None:
            context = None if self.context is None else _lead(self.context, z.ndim)
            mean = mean + self.network(t, deviation, context)
        return mean

    def log_prob(self, e: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return the log density ``(*sample, *batch)`` of increments given the states before each step."""
        scale = _lead(self.scale, e.ndim)
        residual = e / scale - self.mean(t, z)
        factor = _lead(self.gains.factor, e.ndim + 1)
        if factor.shape[-1] == 1:
            white = residual / factor.squeeze(-1)
        else:
            factor = factor.expand(*residual.shape[:-1], *factor.shape[-2:])
            white = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_scale = torch.diagonal(factor, dim1=-2, dim2=-1).log() + scale.log()
        return (-0.5 * white**2 - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1).sum(0)

    def divergence_rate(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the sum over steps of the divergences from the prior increments, ``(*sample, *batch)``."""
        mean = self.mean(t, z)
        factor = _lead(self.gains.factor, mean.ndim + 1)
        log_diagonal = torch.diagonal(factor, dim1=-2, dim2=-1).log()
        spread = (factor**2).sum((-2, -1)) - factor.shape[-1]
        return (0.5 * ((mean**2).sum(-1) + spread) - log_diagonal.sum(-1)).sum(0)


def _rows_times(deviation: Tensor, gain: Tensor) -> Tensor:
    """Return ``K d`` for ``d (*batch, Z)`` and ``K^T (*gain_batch, Z, M)``."""
    if gain.ndim == 2:
        return deviation @ gain
    return (deviation.unsqueeze(-2) @ gain).squeeze(-2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _spread(factor: Tensor, standard: Tensor) -> Tensor:
    if factor.shape[-1] == 1:
        return factor.squeeze(-1) * standard
    return _rows_times(standard, factor.mT)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *batch, ...)`` sample axes after time until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
