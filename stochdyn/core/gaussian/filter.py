r"""The Kalman recursions behind :class:`stochdyn.core.gaussian.chain.GaussianChain`: pure functions on prepared tensors.

All tensors lead with time and carry one flat batch axis ``b`` of size 1 or ``B``. The covariance recursion
knows no data, so it runs once however many series share it; means then carry the series as columns ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.gaussian.recursion import affine_states, covariance_states
from stochdyn.core.gaussian.small import symmetrise
from stochdyn.errors import SingularDiffusionError

__all__ = ["Gains", "backward_covariances", "backward_means", "forward_means", "riccati"]


@dataclass(frozen=True)
class Gains:
    """Everything of a Kalman filter that doesn't depend on the data.

    Attributes:
        predicted: The covariances ``(N+1, b, z, z)`` before each observation.
        gain: ``(N+1, b, z, p)`` Kalman gains.
        factor: The lower Cholesky factors ``(N+1, b, p, p)`` of the innovation covariances.
        weighted: ``(N+1, b, p, z)``, the emission divided from the left by ``factor``.
        closed: ``(N+1, b, z, z)``, identity minus gain times emission.
    """

    predicted: Tensor
    gain: Tensor
    factor: Tensor
    weighted: Tensor
    closed: Tensor

    def filtered(self, obs_cov: Tensor) -> Tensor:
        """Return the covariances after each observation, in Joseph's form."""
        kept = self.closed @ self.predicted @ self.closed.mT
        return symmetrise(kept + self.gain @ obs_cov @ self.gain.mT)


def riccati(
    initial: Tensor, transition: Tensor, noise_cov: Tensor, emission: Tensor, obs_cov: Tensor
) -> Gains:
    r"""Run the covariance recursion of the Kalman filter in Joseph's one-step form.

    With :math:`S=HPH^\top+R`, :math:`K=PH^\top S^{-1}` and :math:`F=A(I-KH)`,

    .. math:: P' = F P F^\top + (AK) R (AK)^\top + Q,

    a sum of positive semi-definite terms: no subtraction, no inverse of :math:`P`.
    """
    scalar = emission.shape[-2] == 1
    cov, covs, gains, factors, failures = initial, [initial], [], [], []
    rows = zip(emission.unbind(0), obs_cov.unbind(0), strict=True)
    steps = [*zip(transition.unbind(0), noise_cov.unbind(0), strict=True), None]
    for (h, r), step in zip(rows, steps, strict=True):
        # S = H P H^T + R and K = P H^T S^{-1}; with one observed component S is a number.
        cross = torch.bmm(h, cov)
        innovation = torch.baddbmm(r, cross, h.mT)
        if scalar:
            factor = innovation.sqrt()
            gain = (cross / innovation).mT
        else:
            factor, info = torch.linalg.cholesky_ex(innovation)
            gain = torch.cholesky_solve(cross, factor).mT
            failures.append(info)
        gains.append(gain)
        factors.append(factor)
        if step is None:
            break
        a, q = step
        # P' = F P F^T + (A K) R (A K)^T + Q with F = A - (A K) H, symmetric by construction.
        ahead = torch.bmm(a, gain)
        closed = torch.baddbmm(a, ahead, h, alpha=-1.0)
        grown = torch.baddbmm(q, torch.bmm(ahead, r), ahead.mT)
        cov = torch.baddbmm(grown, torch.bmm(closed, cov), closed.mT)
        cov = 0.5 * (cov + cov.mT)
        covs.append(cov)
    factor = torch.stack(factors)
    bad = ~(factor > 0) if scalar else torch.stack(failures) != 0
    if bool(bad.any()):
        raise SingularDiffusionError(
            "the predicted covariance of an observation is not positive definite",
            got=f"observation {int(bad.nonzero()[0, 0])}",
            hint="give the observations a positive scale, or compute in float64",
        )
    gain = torch.stack(gains)
    weighted = emission / factor if scalar else torch.linalg.solve_triangular(factor, emission, upper=False)
    closed = torch.eye(initial.shape[-1], dtype=gain.dtype, device=gain.device) - gain @ emission
    return Gains(torch.stack(covs), gain, factor, weighted, closed)


def forward_means(
    gains: Gains, initial: Tensor, transition: Tensor, offset: Tensor, emission: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter the data ``y (N+1, b, p, s)``.

    Returns:
        Predicted means and filtered means ``(N+1, b, z, s)``, and innovations whitened by their covariance,
        ``(N+1, b, p, s)``.
    """
    # Predicted means obey m_{n+1} = A (I - K H) m_n + A K y_n + c; innovations are whitened by L L^T = S.
    entering = gains.gain @ y
    loop = transition @ gains.closed[:-1]
    predicted = affine_states(loop, transition @ entering[:-1] + offset, initial)
    white = torch.linalg.solve_triangular(gains.factor, y - emission @ predicted, upper=False)
    return predicted, gains.closed @ predicted + entering, white


def backward_means(gains: Gains, transition: Tensor, white: Tensor) -> Tensor:
    r"""Run the adjoint recursion of the Bryson-Frazier smoother, which inverts no state covariance.

    .. math:: \lambda_n = H^\top S^{-1}v_n + (I-K_nH_n)^\top A_n^\top\lambda_{n+1}.

    Returns:
        ``(N+1, b, z, s)``: :math:`A_n^\top\lambda_{n+1}`, the message to the *filtered* state ``n``.
    """
    # mu_n = A^T lambda_{n+1} obeys mu_n = A^T (H^T S^{-1} v)_{n+1} + A^T (I - K H)^T_{n+1} mu_{n+1}, backwards in time.
    entering = transition.mT @ (gains.weighted[1:].mT @ white[1:])
    loop = transition.mT @ gains.closed[1:].mT
    last = torch.zeros_like(gains.predicted[0, :, :, :1]).expand(-1, -1, white.shape[-1])
    return affine_states(loop.flip(0), entering.flip(0), last).flip(0)


def backward_covariances(gains: Gains, transition: Tensor) -> Tensor:
    r"""Run the covariance of :func:`backward_means`.

    .. math:: \Lambda_n = H^\top S^{-1}H + (I-KH)^\top A^\top\Lambda_{n+1}A(I-KH).

    Returns:
        ``(N+1, b, z, z)``: :math:`A_n^\top\Lambda_{n+1}A_n`.
    """
    # The same congruence for A^T Lambda A: noise covariance (L^{-1} H A)^T (L^{-1} H A), transition ((I - K H) A)^T.
    seen = gains.weighted[1:] @ transition
    loop = gains.closed[1:] @ transition
    return covariance_states(
        loop.mT.flip(0), (seen.mT @ seen).flip(0), torch.zeros_like(gains.predicted[0])
    ).flip(0)
