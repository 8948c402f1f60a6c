"""A Gaussian law on paths under linear control: exact moments, exact divergence, draws of all times at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stochdyn.core.gaussian.affine import LinearSteps
from stochdyn.core.gaussian.recursion import affine_states, gaussian_moments

__all__ = ["GaussianDraws", "GaussianPathLaw", "LinearControl", "StartLaw"]


@dataclass(frozen=True)
class LinearControl:
    r"""The law :math:`\epsilon_n\mid z_n\sim N(k_n+K_n(z_n-E z_n),\,L_nL_n^\top)` of standardised increments.

    Feedback on the deviation from the mean leaves the mean to the offsets alone, which makes the two easy to
    learn together.

    Attributes:
        offset: ``k (N, *B, M)``.
        gain: ``K (N, *B, M, Z)``.
        factor: ``L (N, *B, M, M)``, lower triangular with a positive diagonal.
    """

    offset: Tensor
    gain: Tensor
    factor: Tensor


@dataclass(frozen=True)
class StartLaw:
    r"""A Gaussian start :math:`z_0=o+Jv`, :math:`v\sim N(\mu,SS^\top)` under Q and :math:`N(\mu_0,\Pi^{-1})` under P.

    Attributes:
        origin: ``o (*B, Z)``.
        lift: ``J (Z, D)``; D may be 0.
        mean: ``(*B, D)``.
        factor: ``S (*B, D, D)``, lower triangular.
        prior_mean: ``(*B, D)``.
        prior_precision: ``(*B, D, D)``.
    """

    origin: Tensor
    lift: Tensor
    mean: Tensor
    factor: Tensor
    prior_mean: Tensor
    prior_precision: Tensor

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
        log_ratio = 2 * _log_diagonal(self.factor) + torch.linalg.slogdet(self.prior_precision)[1]
        return 0.5 * (pull + spread - size - log_ratio)

    def log_ratio(self, standard: Tensor) -> Tensor:
        """Return log q(v) - log p(v) at ``v = mean + S standard``, ``(*B, S)``, for columns of normals."""
        gap = (self.mean - self.prior_mean).unsqueeze(-1) + self.factor @ standard
        squares = (gap * (self.prior_precision @ gap)).sum(-2) - standard.square().sum(-2)
        constant = _log_diagonal(self.factor) + 0.5 * torch.linalg.slogdet(self.prior_precision)[1]
        return 0.5 * squares - constant.unsqueeze(-1)


@dataclass(frozen=True)
class GaussianDraws:
    """Draws of a path, in columns.

    Attributes:
        z: ``(N+1, *B, Z, S)`` full states.
        deviation: the same less their means.
        noise: ``(N, *B, M, S)`` the standard normals behind them.
        start_noise: ``(*B, D, S)``.
    """

    z: Tensor
    deviation: Tensor
    noise: Tensor
    start_noise: Tensor


@dataclass(frozen=True)
class GaussianPathLaw:
    """Q: linear steps under a linear control.

    Attributes:
        steps: the recursion under P (or under the linear equation that stands for it).
        control: the law of its increments.
        start: the law of its start.
    """

    steps: LinearSteps
    control: LinearControl
    start: StartLaw

    @cached_property
    def transition(self) -> Tensor:
        """``A + B K (N, *B, Z, Z)``."""
        return self.steps.transition + self.steps.load @ self.control.gain

    @cached_property
    def mean(self) -> Tensor:
        """Means ``(N+1, *B, Z)`` of the full state; the feedback has no part in them."""
        push = self.steps.offset.unsqueeze(-1) + self.steps.load @ self.control.offset.unsqueeze(-1)
        start = self.start.moments()[0].unsqueeze(-1)
        return affine_states(self.steps.transition, push, start).squeeze(-1)

    @cached_property
    def spread(self) -> Tensor:
        """``B L (N, *B, Z, M)``."""
        return self.steps.load @ self.control.factor

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
        gain, factor = self.control.gain, self.control.factor
        squares = self.control.offset.square().sum(-1) + ((gain @ cov) * gain).sum((-2, -1))
        spread = factor.square().sum((-2, -1)) - factor.shape[-1]
        return (0.5 * (squares + spread) - _log_diagonal(factor)).sum(0) + self.start.divergence()

    def draw(self, n: int, generator: torch.Generator | None = None) -> GaussianDraws:
        """Draw ``n`` paths, all times at once; differentiable."""
        like, mean = self.spread, self.mean

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

        batch = torch.broadcast_shapes(like.shape[1:-2], mean.shape[1:-1])
        noise = normal(like.shape[0], *batch, like.shape[-1], n)
        first = normal(*batch, self.start.mean.shape[-1], n)
        deviation = affine_states(self.transition, like @ noise, self.start.lift @ self.start.factor @ first)
        return GaussianDraws(mean.unsqueeze(-1) + deviation, deviation, noise, first)

    def increments(self, draws: GaussianDraws) -> tuple[Tensor, Tensor]:
        """Return the standardised increments of draws and their conditional means, ``(N, *B, M, S)`` each."""
        mean = self.control.gain @ draws.deviation[:-1] + self.control.offset.unsqueeze(-1)
        return mean + self.control.factor @ draws.noise, mean


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
