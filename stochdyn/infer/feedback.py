"""Feedback laws as controls of the time loop: linear feedback on the state, and what a network adds to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stochdyn.core.gaussian.feedback import LinearFeedback
from stochdyn.core.gaussian.small import times
from stochdyn.core.sde.control import Control, Rest
from stochdyn.infer.coupling import Coupling

__all__ = ["Feedback"]

_Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Feedback(Control):
    r"""A control of all increments of a step, as the posterior of a path needs it.

    The standardised increment :math:`\epsilon_n=e_n/\sqrt{\mathrm{variance}_n}` of step :math:`n` is

    .. math:: \epsilon_n\mid z_n\sim N\big(k_n+K_n(z_n-\bar z_n)+\mathrm{net}(t_n,(z_n-\bar z_n)/w),\ L_nL_n^\top\big).

    The covariance of a step is a free triangular factor, so the law on the grid can match the exact posterior of a
    linear-Gaussian model at any step size. ``z`` is the full state, followed by the sums of a coupling where there is one.

    Args:
        law: The linear part.
        scale: ``(N, M)`` or ``(N, *batch, M)`` prior standard deviations of the increments.
        network: The nonlinear part ``(t, (z - c) / w, context) -> (..., M)``, or None.
        width: ``w (*batch, Z)`` units of the network's input; None for ones.
        context: ``(N, *batch, C)`` what the network is told at each step, or None.
        coupling: The part of the path that the feedback remembers for observations that couple times, or None.
        own: The control of the equation itself, which acts on the increments after the feedback.
    """

    def __init__(
        self,
        law: LinearFeedback,
        scale: Tensor,
        network: _Network | None = None,
        width: Tensor | None = None,
        context: Tensor | None = None,
        coupling: Coupling | None = None,
        own: Control | None = None,
    ) -> None:
        super().__init__()
        self.law, self.scale, self.network, self.width = law, scale, network, width
        self.context, self.coupling, self.own = context, coupling, own
        self._sums: Tensor | None = None
        assert law.centre is not None
        # Rows by step, so that the time loop indexes nothing.
        self._rows = [
            r.unbind(0) for r in (law.offset, law.gain.mT.contiguous(), law.factor, law.centre, scale)
        ]

    def before(self, own: Control | None) -> Feedback:
        """Return the same feedback, followed by the control of the equation itself."""
        return Feedback(self.law, self.scale, self.network, self.width, self.context, self.coupling, own)

    def shape_increment(
        self, n: int, t: Tensor, dt: Tensor | float, z: Tensor, e: Tensor, channels: int
    ) -> Tensor:
        """Turn standard increments of step ``n`` into those of the feedback law, and then of the equation's own control."""
        offset, gain, factor, centre, scale = (rows[n] for rows in self._rows)
        state = z
        if self.coupling is not None:
            x = z[..., : self.coupling.rows.shape[-1]]
            self._sums = self.coupling.step(n, self._sums if n else None, x)
            state = torch.cat([z, self._sums.expand(*z.shape[:-1], -1)], -1)
        deviation = state - centre
        mean = offset + _rows_times(deviation, gain)
        if self.network is not None:
            context = None if self.context is None else self.context[n]
            mean = mean + self.network(t, self._scaled(deviation), context)
        shaped = (mean + _spread(factor, e / scale)) * scale
        return shaped if self.own is None else self.own.shape_increment(n, t, dt, z, shaped, channels)

    def affine(self, e: Tensor) -> tuple[Tensor, Tensor, Rest | None] | None:
        """Return the increments as an affine function of the state and the network's part; None where more is remembered."""
        if self.own is not None or self.coupling is not None:
            return None
        law, ndim, scale = self.law, e.ndim, _lead(self.scale, e.ndim)
        assert law.centre is not None
        offset = law.offset - times(law.gain, law.centre)
        noise = times(_lead(law.factor, ndim + 1), e / scale)
        shift = (_lead(offset, ndim) + noise) * scale
        gain = _lead(law.gain.mT, ndim + 1) * scale.unsqueeze(-2)
        return shift, gain, None if self.network is None else self._answer

    def _answer(self, n: int, t: Tensor, z: Tensor) -> Tensor:
        """Return what the network adds to the increments of step ``n``."""
        assert self.network is not None
        context = None if self.context is None else self.context[n]
        return self.network(t, self._scaled(z - self._rows[3][n]), context) * self._rows[4][n]

    def remembered(self, z: Tensor) -> Tensor:
        """Return what the feedback answers to at the first points ``z (T', *sample, *batch, Z)`` of paths: states and sums."""
        if self.coupling is None:
            return z
        sums = self.coupling.sums(z[..., : self.coupling.rows.shape[-1]])
        return torch.cat([z, sums.expand(*z.shape[:-1], -1)], -1)

    def mean(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the conditional means of all steps, ``(N, *sample, *batch, M)``, given ``z`` before each."""
        state = self.remembered(z)
        mean, extra = self.law.mean(state), self._extra(t, state)
        return mean if extra is None else mean + extra

    def log_prob(self, e: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return the log density ``(*sample, *batch)`` of increments given the states before each step."""
        scale, state = _lead(self.scale, e.ndim), self.remembered(z)
        density = self.law.log_prob(e / scale, state, self._extra(t, state))
        return density - scale.log().sum(-1).sum(0)

    def divergence_rate(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the sum over steps of the divergences from the prior increments, ``(*sample, *batch)``."""
        state = self.remembered(z)
        return self.law.divergence_rate(state, self._extra(t, state))

    def _extra(self, t: Tensor, state: Tensor) -> Tensor | None:
        if self.network is None:
            return None
        assert self.law.centre is not None
        context = None if self.context is None else _lead(self.context, state.ndim)
        return self.network(t, self._scaled(state - _lead(self.law.centre, state.ndim)), context)

    def _scaled(self, deviation: Tensor) -> Tensor:
        return deviation if self.width is None else deviation / self.width


def _rows_times(deviation: Tensor, gain: Tensor) -> Tensor:
    """Return ``K d`` for ``d (*batch, Z)`` and ``K^T (*gain_batch, Z, M)``."""
    if gain.ndim == 2:
        return deviation @ gain
    return (deviation.unsqueeze(-2) @ gain).squeeze(-2)


def _spread(factor: Tensor, standard: Tensor) -> Tensor:
    if factor.shape[-1] == 1:
        return factor.squeeze(-1) * standard
    return _rows_times(standard, factor.mT)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *batch, ...)`` sample axes after time until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
