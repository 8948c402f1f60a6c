"""A linear reference with constant coefficients, pinned at both ends of an interval."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.gaussian.small import psd_factor, symmetrise
from stochdyn.errors import SingularDiffusionError

__all__ = ["PinnedLinear"]


class PinnedLinear:
    r"""The law of a linear reference on an interval of length ``horizon`` given both ends.

    .. math::
        X_t\mid X_0,X_T\sim N(K_0(t)X_0+K_1(t)X_T+k(t),\,P(t)),\qquad
        K_1=Q_t\Phi_{T-t}^\top Q_T^{-1},\quad K_0=\Phi_t-K_1\Phi_T .

    Raises:
        SingularDiffusionError: if the reference can't move some direction within the interval.
    """

    def __init__(self, reference: LinearGaussianMeasure, horizon: float) -> None:
        self.reference, self.horizon = reference, float(horizon)
        like = reference.initial_mean
        self.like, self.dim = like, like.shape[-1]
        self.phi, self.shift, self.noise = self.transition(
            like.new_zeros(()), like.new_full((), self.horizon)
        )
        self.factor = _reachable(self.noise)

    def transition(self, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, shift and noise of the reference between times ``(*s,)`` since the start of the interval."""
        origin = self.reference.initial_time
        parts = self.reference.transition(start.reshape(-1) + origin, stop.reshape(-1) + origin)
        phi, shift, noise = (p.reshape(*start.shape, *p.shape[1:]) for p in parts)
        return phi, shift, noise

    def weights(self, clock: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights of both ends ``(*s, d, d)``, shift ``(*s, d)`` and covariance ``(*s, d, d)`` at ``clock (*s,)``."""
        phi, shift, noise = self.transition(torch.zeros_like(clock), clock)
        onward, _, _ = self.transition(clock, torch.full_like(clock, self.horizon))
        last = torch.cholesky_solve(onward @ noise, self.factor).mT
        return (
            phi - last @ self.phi,
            last,
            shift - last @ self.shift,
            symmetrise(noise - last @ onward @ noise),
        )

    def joint(self, clock: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the ends ``(T d, 2d)``, shift ``(T, d)`` and covariance ``(T d, T d)`` of a whole path."""
        count = clock.shape[0]
        first, last, shift, spread = self.weights(clock)
        early, late = torch.triu_indices(count, count, offset=1)
        ahead, _, _ = self.transition(clock[early], clock[late])
        _, _, noise = self.transition(torch.zeros_like(clock), clock)
        onward, _, _ = self.transition(clock, torch.full_like(clock, self.horizon))
        cross = noise[early] @ ahead.mT - last[early] @ (onward @ noise)[late]
        blocks = spread.new_zeros(count, count, self.dim, self.dim)
        index = torch.arange(count)
        blocks[index, index] = spread
        blocks[early, late], blocks[late, early] = cross, cross.mT
        ends = torch.cat((first, last), -1).reshape(count * self.dim, 2 * self.dim)
        return ends, shift, symmetrise(blocks.permute(0, 2, 1, 3).reshape((count * self.dim,) * 2))

    def sample(
        self, clock: Tensor, start: Tensor, end: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw paths ``(n, T, d)`` at ``clock (T,)`` between ``start (n, d)`` and ``end (n, d)``."""
        ends, shift, cov = self.joint(clock)
        mean = torch.cat((start, end), -1) @ ends.mT
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + noise @ psd_factor(cov).mT).reshape(-1, clock.shape[0], self.dim) + shift


def _reachable(noise: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(noise)
    if bool(info > 0):
        raise SingularDiffusionError(
            "the reference's noise doesn't reach every direction within the horizon",
            got=f"smallest eigenvalue {float(torch.linalg.eigvalsh(noise)[0]):.3g} of the transition covariance",
            hint="give a diffusion of full rank, or a drift that carries the noise on",
        )
    return factor
