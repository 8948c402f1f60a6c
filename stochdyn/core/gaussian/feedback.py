r"""Linear feedback laws of the increments of linear steps: exact posteriors, moments, divergences, draws of all times at once.

The standardised increment of a step answers linearly to the state before it,

.. math:: z_{n+1}=A_nz_n+c_n+B_n\epsilon_n,\qquad \epsilon_n\mid z_n\sim N\big(k_n+K_n(z_n-\bar z_n),\,L_nL_n^\top\big),

under the law Q, and is standard normal under P. The posterior of a linear-Gaussian model has this form
(:func:`feedback_given`), and so do the guides and variational posteriors of other models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, values_are_checked
from stochdyn.core.gaussian.affine import LinearSteps
from stochdyn.core.gaussian.recursion import affine_states, covariance_states, gaussian_moments
from stochdyn.core.gaussian.small import times
from stochdyn.core.law.marginals import Generator

__all__ = ["FeedbackDraws", "FeedbackLaw", "LiftedStart", "LinearFeedback", "feedback_given", "start_lift"]


@dataclass(frozen=True)
class LinearFeedback:
    r"""The law :math:`\epsilon_n\mid z_n\sim N(k_n+K_n(z_n-\bar z_n),\,L_nL_n^\top)` of standardised increments.

    Feedback on the deviation from the mean leaves the mean to the offsets alone, which makes the two easy to
    learn together.

    Attributes:
        offset: The constant parts of the steps, ``k (N, *B, M)``.
        gain: ``K (N, *B, M, Z)``.
        factor: The factor ``L (N, *B, M, M)``, lower triangular with a positive diagonal.
        centre: The centre :math:`\bar z`, ``(N, *B, Z)``; None for the mean of z under the law itself.
    """

    offset: Tensor
    gain: Tensor
    factor: Tensor
    centre: Tensor | None = None

    def mean(self, z: Tensor) -> Tensor:
        """Return the conditional means ``(N, *sample, *B, M)`` given the states ``z (N, *sample, *B, Z)`` before each step.

        The law must have a centre of its own.
        """
        assert self.centre is not None
        deviation = z - _lead(self.centre, z.ndim)
        return _lead(self.offset, z.ndim) + times(_lead(self.gain, z.ndim + 1), deviation)

    def log_prob(self, e: Tensor, z: Tensor, extra: Tensor | None = None) -> Tensor:
        """Return the log density ``(*sample, *B)`` of standardised increments ``e (N, *sample, *B, M)`` given the states.

        Args:
            e: The increments.
            z: The states ``(N, *sample, *B, Z)``.
            extra: What is added to the conditional means, such as a network's answer, or None.
        """
        residual = e - self.mean(z) if extra is None else e - self.mean(z) - extra
        factor = _lead(self.factor, e.ndim + 1)
        if factor.shape[-1] == 1:
            white = residual / factor.squeeze(-1)
        else:
            factor = factor.expand(*residual.shape[:-1], *factor.shape[-2:])
            white = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
        logs = factor.diagonal(dim1=-2, dim2=-1).log()
        return (-0.5 * white.square() - logs - 0.5 * math.log(2 * math.pi)).sum(-1).sum(0)

    def divergence_rate(self, z: Tensor, extra: Tensor | None = None) -> Tensor:
        """Return the sum over steps of the divergences from standard normals given the states, ``(*sample, *B)``."""
        mean = self.mean(z) if extra is None else self.mean(z) + extra
        factor = _lead(self.factor, mean.ndim + 1)
        spread = factor.square().sum((-2, -1)) - factor.shape[-1]
        return (0.5 * (mean.square().sum(-1) + spread) - log_diagonal(factor)).sum(0)


@dataclass(frozen=True)
class LiftedStart:
    r"""A Gaussian start :math:`z_0=o+Jv`, :math:`v\sim N(\mu,SS^\top)` under Q and :math:`N(\mu_0,\Pi^{-1})` under P.

    Attributes:
        origin: ``o (*B, Z)``.
        lift: ``J (Z, D)``; D may be 0.
        mean: The mean ``(*B, D)``.
        factor: The factor ``S (*B, D, D)``, lower triangular.
        prior_mean: The mean of a prior, ``(*B, D)``.
        prior_precision: ``(*B, D, D)``.
    """

    origin: Tensor
    lift: Tensor
    mean: Tensor
    factor: Tensor
    prior_mean: Tensor
    prior_precision: Tensor

    @classmethod
    def of_prior(cls, origin: Tensor, lift: Tensor, mean: Tensor, precision: Tensor) -> LiftedStart:
        """Return the start under P, as its own Q."""
        factor = _cholesky(torch.linalg.inv_ex(precision)[0]) if mean.shape[-1] else precision
        return cls(origin, lift, mean, factor, mean, precision)

    def given(self, precision: Tensor, linear: Tensor) -> LiftedStart:
        r"""Return the start with the posterior as Q, for a likelihood :math:`\exp(-\tfrac12z_0^\top Sz_0+\eta^\top z_0)`.

        Args:
            precision: S, ``(*B, Z, Z)``.
            linear: The linear part :math:`\eta`, ``(*B, Z)``.
        """
        total = self.prior_precision + self.lift.mT @ precision @ self.lift
        pull = times(self.prior_precision, self.prior_mean) + times(
            self.lift.mT, linear - times(precision, self.origin)
        )
        chol = _cholesky(total)
        mean = torch.cholesky_solve(pull.unsqueeze(-1), chol).squeeze(-1)
        factor = _cholesky(torch.cholesky_inverse(chol))
        return LiftedStart(self.origin, self.lift, mean, factor, self.prior_mean, self.prior_precision)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean ``(*B, Z)`` and covariance ``(*B, Z, Z)`` of the start."""
        spread = self.lift @ self.factor
        return self.origin + self.mean @ self.lift.mT, spread @ spread.mT

    def divergence(self) -> Tensor:
        """Return KL(q(v) || p(v)), ``(*B)``."""
        size = self.mean.shape[-1]
        gap = (self.mean - self.prior_mean).unsqueeze(-1)
        pull = (gap.mT @ self.prior_precision @ gap)[..., 0, 0]
        spread = (self.factor * (self.prior_precision @ self.factor)).sum((-2, -1))
        log_ratio = 2 * log_diagonal(self.factor) + torch.linalg.slogdet(self.prior_precision)[1]
        return 0.5 * (pull + spread - size - log_ratio)

    def log_ratio(self, standard: Tensor) -> Tensor:
        """Return log q(v) - log p(v) at ``v = mean + S standard``, ``(*B, S)``, for columns of normals."""
        gap = (self.mean - self.prior_mean).unsqueeze(-1) + self.factor @ standard
        squares = (gap * (self.prior_precision @ gap)).sum(-2) - standard.square().sum(-2)
        constant = log_diagonal(self.factor) + 0.5 * torch.linalg.slogdet(self.prior_precision)[1]
        return 0.5 * squares - constant.unsqueeze(-1)


def start_lift(like: Tensor, size: int, random: int, factor: Tensor | None, channels: int) -> Tensor:
    """Return the matrix ``J (size, D)`` from what is random at a start to the full state: path, then memory of its noise.

    Args:
        like: A tensor of the precision and device.
        size: Z, of the full state.
        random: The number of components of the path that are random: all or none.
        factor: The factor ``(Q, K)`` from the standard normals of a channel's past to its memory states; None without a
            past.
        channels: The number of noise channels.
    """
    past = 0 if factor is None else channels * factor.shape[0]
    lift = like.new_zeros(size, random + past)
    lift[:random, :random] = torch.eye(random, dtype=lift.dtype, device=lift.device)
    if factor is not None:
        lift[size - channels * factor.shape[1] :, random:] = torch.block_diag(
            *[factor.mT.to(lift)] * channels
        )
    return lift


@dataclass(frozen=True)
class FeedbackDraws:
    """Draws of a path, in columns.

    Attributes:
        z: The full states ``(N+1, *B, Z, S)``.
        deviation: The same less their means.
        noise: The standard normals ``(N, *B, M, S)`` behind them.
        start_noise: ``(*B, D, S)``.
    """

    z: Tensor
    deviation: Tensor
    noise: Tensor
    start_noise: Tensor


@dataclass(frozen=True)
class FeedbackLaw:
    """Q: linear steps under linear feedback on the deviation from their own mean.

    Attributes:
        steps: The recursion under P (or under the linear equation that stands for it).
        feedback: The law of its increments, with no centre but the mean.
        start: The law of its start.
    """

    steps: LinearSteps
    feedback: LinearFeedback
    start: LiftedStart

    @cached_property
    def transition(self) -> Tensor:
        """``A + B K (N, *B, Z, Z)``."""
        return self.steps.transition + self.steps.load @ self.feedback.gain

    @cached_property
    def mean(self) -> Tensor:
        """Means ``(N+1, *B, Z)`` of the full state; the feedback has no part in them."""
        shift = self.steps.offset.unsqueeze(-1) + self.steps.load @ self.feedback.offset.unsqueeze(-1)
        start = self.start.moments()[0].unsqueeze(-1)
        return affine_states(self.steps.transition, shift, start).squeeze(-1)

    @cached_property
    def spread(self) -> Tensor:
        """``B L (N, *B, Z, M)``."""
        return self.steps.load @ self.feedback.factor

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means ``(N+1, *B, Z)`` and covariances ``(N+1, *B, Z, Z)`` of the full state."""
        cov = self.start.moments()[1]
        noise = self.spread @ self.spread.mT
        still = noise.new_zeros(noise.shape[:-1])
        return self.mean, gaussian_moments(self.transition, still, noise, still[0], cov)[1]

    def divergence(self) -> Tensor:
        r"""Return the divergence of the increments' law and the start's from P, ``(*B)``, in closed form.

        .. math:: \tfrac12\sum_n\big[|k_n|^2+\mathrm{tr}\,K_nP_nK_n^\top+\mathrm{tr}\,L_nL_n^\top-M\big]
            -\sum_n\log\det L_n .
        """
        cov = self.moments[1][:-1]
        gain, factor = self.feedback.gain, self.feedback.factor
        squares = self.feedback.offset.square().sum(-1) + ((gain @ cov) * gain).sum((-2, -1))
        spread = factor.square().sum((-2, -1)) - factor.shape[-1]
        return (0.5 * (squares + spread) - log_diagonal(factor)).sum(0) + self.start.divergence()

    def draw(self, count: int, generator: Generator = None) -> FeedbackDraws:
        """Draw ``count`` paths, all times at once; differentiable."""
        like, mean = self.spread, self.mean
        source = as_generator(generator, like.device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=like.dtype, device=like.device)

        batch = torch.broadcast_shapes(like.shape[1:-2], mean.shape[1:-1])
        noise = normal(like.shape[0], *batch, like.shape[-1], count)
        first = normal(*batch, self.start.mean.shape[-1], count)
        deviation = affine_states(self.transition, like @ noise, self.start.lift @ self.start.factor @ first)
        return FeedbackDraws(mean.unsqueeze(-1) + deviation, deviation, noise, first)

    def increments(self, draws: FeedbackDraws) -> tuple[Tensor, Tensor]:
        """Return the standardised increments of draws and their conditional means, ``(N, *B, M, S)`` each."""
        mean = self.feedback.gain @ draws.deviation[:-1] + self.feedback.offset.unsqueeze(-1)
        return mean + self.feedback.factor @ draws.noise, mean


def feedback_given(
    steps: LinearSteps, precision: Tensor, linear: Tensor
) -> tuple[LinearFeedback, Tensor, Tensor]:
    r"""Return the exact posterior of the increments, given a log-likelihood that is quadratic in each state.

    The likelihood of all data from step n on is :math:`\exp(-\tfrac12z_n^\top S_nz_n+\eta_n^\top z_n)` up to a constant, with

    .. math::
        Q_n&=I+B_n^\top S_{n+1}B_n,\qquad
        \epsilon_n\mid z_n,\text{data}\sim N\big(Q_n^{-1}B_n^\top(\eta_{n+1}-S_{n+1}(A_nz_n+c_n)),\ Q_n^{-1}\big),\\
        S_n&=H_n+A_n^\top S_{n+1}A_n-A_n^\top S_{n+1}B_nQ_n^{-1}B_n^\top S_{n+1}A_n ,

    and likewise for :math:`\eta_n`: the backward information filter, or the linear-quadratic regulator, of the model.

    Args:
        steps: The linear steps.
        precision: The precision ``H (N+1, *B, d, d)`` of the log-likelihood :math:`-\tfrac12xHx+hx` in the first d
            components at each time.
        linear: The linear part ``h (N+1, *B, d)``.

    Returns:
        The feedback law, with centre zero, and ``S (N+1, *B, Z, Z)`` and ``eta (N+1, *B, Z)``, the likelihood of the data from
        every grid point on as a function of the state there; the first of them is that of the start
        (see :meth:`LiftedStart.given`).
    """
    a, b, c = steps.transition, steps.load, steps.offset
    size, dim, channels = a.shape[-1], linear.shape[-1], b.shape[-1]
    batch = torch.broadcast_shapes(
        a.shape[1:-2], b.shape[1:-2], c.shape[1:-1], precision.shape[1:-2], linear.shape[1:-1]
    )
    # One more component that is always 1 makes quadratics and maps homogeneous: V(z) = -1/2 [z 1] S [z 1]^T.
    width = size + 1
    load = torch.cat([_spread(b, batch, 2), b.new_zeros(b.shape[0], *batch, 1, channels)], -2)
    forth = torch.cat([_spread(a, batch, 2), _spread(c, batch, 1).unsqueeze(-1)], -1)
    last = torch.zeros(width, dtype=a.dtype, device=a.device)
    last[-1] = 1.0
    forth = torch.cat([forth, last.expand(*forth.shape[:-2], 1, width)], -2)
    curve = torch.nn.functional.pad(_spread(precision, batch, 2), (0, width - dim, 0, width - dim))
    slope = torch.nn.functional.pad(_spread(linear, batch, 1), (0, width - dim)).unsqueeze(-1)
    values = _values(forth, load, curve - slope * last - (slope * last).mT)
    ahead = load.mT @ values[1:]
    eye = torch.eye(channels, dtype=b.dtype, device=b.device)
    needed = eye + ahead @ load
    if channels == 1:
        # Numbers: a factorisation of 1 x 1 matrices costs ten times as much.
        law, factor = -(ahead @ forth) / needed, torch.rsqrt(needed)
    else:
        # Q = I + B'SB is at least 1, so its factor needs no check, which would wait for the device.
        chol = torch.linalg.cholesky_ex(needed)[0]
        law = -torch.cholesky_solve(ahead @ forth, chol)
        factor = torch.linalg.cholesky_ex(torch.cholesky_inverse(chol))[0]
    gain = law[..., :-1]
    centre = gain.new_zeros(*gain.shape[:-2], size)
    feedback = LinearFeedback(law[..., -1], gain, factor, centre)
    return feedback, values[..., :size, :size], -values[..., :size, size]


def _spread(x: Tensor, batch: torch.Size, events: int) -> Tensor:
    """Give ``x (N, *b, *event)`` the batch axes ``batch``."""
    event = x.shape[x.ndim - events :]
    lead = len(batch) - (x.ndim - 1 - events)
    return x.reshape(x.shape[0], *(1,) * lead, *x.shape[1:]).expand(x.shape[0], *batch, *event)


def _values(forth: Tensor, load: Tensor, local: Tensor) -> Tensor:
    """Return the quadratics ``S (N+1, *batch, W, W)`` of all data from every grid point on.

    Args:
        forth: The maps of the homogeneous state, ``(N, *batch, W, W)``.
        load: ``(N, *batch, W, M)``.
        local: The quadratics of the data at each grid point, ``(N+1, *batch, W, W)``.
    """
    batch = forth.shape[1:-2]
    flat = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (forth, load, local))
    values: Tensor = _Values.apply(*flat)
    return values.reshape(values.shape[0], *batch, *values.shape[-2:])


class _Values(torch.autograd.Function):
    r"""The Riccati recursion, and its derivative along the optimal increments.

    .. math:: S_n=H_n+A^\top S_{n+1}A-A^\top S_{n+1}B(I+B^\top S_{n+1}B)^{-1}B^\top S_{n+1}A

    With :math:`K` the optimal feedback and :math:`F=A+BK`, the derivative is that of the fixed feedback (the envelope
    theorem), :math:`dS_n=dH_n+F^\top dS_{n+1}F+F^\top S_{n+1}D+D^\top S_{n+1}F` with :math:`D=dA+dB\,K`: its adjoint is
    one covariance recursion forwards in time.
    """

    @staticmethod
    def forward(ctx: Any, forth: Tensor, load: Tensor, local: Tensor) -> Tensor:
        width, channels = forth.shape[-1], load.shape[-1]
        both = torch.cat([forth, load], -1)
        eye = torch.eye(channels, dtype=load.dtype, device=load.device)
        values = torch.empty_like(local)
        s = values[-1] = local[-1]
        for n in range(forth.shape[0] - 1, -1, -1):
            block = both[n].mT @ s @ both[n]
            cross = block[:, width:, :width]
            ahead = block[:, width:, width:] + eye
            if channels == 1:
                s = torch.baddbmm(block[:, :width, :width], cross.mT, cross / ahead, alpha=-1.0)
            else:
                s = torch.baddbmm(
                    block[:, :width, :width], cross.mT, torch.linalg.solve_ex(ahead, cross)[0], alpha=-1.0
                )
            s = local[n] + 0.5 * (s + s.mT)
            values[n] = s
        ctx.save_for_backward(forth, load, values)
        return values

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        forth, load, values = ctx.saved_tensors
        channels = load.shape[-1]
        slope = 0.5 * (slope + slope.mT)
        after = values[1:]
        eye = torch.eye(channels, dtype=load.dtype, device=load.device)
        ahead = load.mT @ after
        needed = eye + ahead @ load
        law = -(ahead @ forth) / needed if channels == 1 else -torch.linalg.solve_ex(needed, ahead @ forth)[0]
        closed = forth + load @ law
        # Lambda_{n+1} = slope_{n+1} + F Lambda_n F^T
        adjoint = covariance_states(closed, slope[1:], slope[0])
        to_map = 2.0 * (after @ closed @ adjoint[:-1])
        return to_map, to_map @ law.mT, adjoint


def _cholesky(x: Tensor) -> Tensor:
    """Return the Cholesky factor; looking whether there is one waits for the device, so it is part of the checks of values."""
    return torch.linalg.cholesky_ex(x, check_errors=values_are_checked())[0]


def log_diagonal(factor: Tensor) -> Tensor:
    """Return the log determinant of triangular matrices."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _lead(x: Tensor, ndim: int) -> Tensor:
    """Give ``x (N, *batch, ...)`` sample axes after time until it has ``ndim`` axes."""
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
